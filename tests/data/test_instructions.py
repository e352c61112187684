"""Sentences of published prompts about the answer's form are removed anywhere; unknown ones are listed."""

import pytest

from retool_jax.data.instructions import INSTRUCTION, prompt_of, question_of, unknown_instructions
from retool_jax.data.problems import control_characters

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "%s (without quotes) where $Answer is the answer to the problem.\n\n%s\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


@pytest.mark.parametrize(
    "prompt",
    [
        "Find\n\n$x$.",
        DAPO_PROMPT % ("$Answer", "Find\n\n$x$."),
        DAPO_PROMPT % (r"\boxed{$Answer}", "Find\n\n$x$."),
        DAPO_PROMPT % ("$Answer", "Find\n\n$x$.")
        + "\nThe answer format must be: \\boxed{'The final answer goes here.'}",
        f"Find\n\n$x$.\n\n{INSTRUCTION}\n\n{INSTRUCTION}\n",
        "Find\n\n$x$.\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ],
)
def test_the_answer_is_asked_for_once_and_in_one_way(prompt):
    assert question_of(prompt) == "Find\n\n$x$."
    asked = prompt_of(prompt)
    assert asked == f"Find\n\n$x$.\n\n{INSTRUCTION}" == prompt_of(asked)
    assert asked.count("boxed") == 1 and "Answer:" not in asked and "'" not in asked and not control_characters(asked)


def test_the_instruction_holds_a_box_and_no_control_character():
    assert r"\boxed{}" in INSTRUCTION and not control_characters(INSTRUCTION)
    assert control_characters("put it in \boxed{}\n\t") == "\b", "what a literal that is not raw makes of it"


R1 = (
    "A conversation between User and Assistant. The {user} asks a question, and the Assistant solves it. The"
    " {assistant} first thinks about the reasoning process in the mind and then provides the {user} with the answer."
)


@pytest.mark.parametrize(
    "prompt",
    [
        'Find $x$. Let\'s think step by step and output the final answer after "####".',
        "Find $x$. Let's think step by step and output the final answer within \\boxed{}.",
        "Let\u2019s think step by step\nand output the final answer within \\boxed{ }\n\nFind $x$.",
        "Find $x$. You FIRST think about the reasoning process as an internal monologue and then provide the final"
        " answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in"
        " \\boxed{}.",
        R1.format(user="user", assistant="assistant") + " The reasoning process and answer are enclosed within <think>"
        " </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer>"
        " answer here </answer>.\n\nFind $x$.",
        R1.format(user="User", assistant="Assistant") + " The reasoning process is enclosed within <think> </think> and"
        " answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> reasoning process here"
        " </think> <answer> answer here </answer>. User: You must put your answer inside <answer> </answer> tags, i.e.,"
        " <answer> answer here </answer>. And your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "This is the problem:\nFind $x$.\nAssistant: <think>",
        R1.format(user="user", assistant="assistant") + "\nUser: Find $x$. Show your work in <think> </think> tags. And"
        " return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\nAssistant:"
        " Let me solve this step by step.\n<think>",
        "Find $x$.\n\nPresent the answer in LaTex format: \\boxed{Your answer}",
        "Please reason step by step and put your final answer within \\boxed{}.\n\nFind $x$.",
        "Find $x$.\nplease reason step by step, and put your final answer within \\\\boxed{{}}",
        "Find $x$.\nPlease reason step by step, and put your final answer within \boxed{}.",  # not a raw literal
        "Find $x$.\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",  # noqa: RUF001
        DAPO_PROMPT.replace('"Answer:".', '"Answer:", and you do not need to use a \\boxed command.')
        % ("$ANSWER", "Find $x$."),
        "Solve the following math problem efficiently and clearly.  The last line of your response should be of the"
        " following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes)"
        " where ANSWER is just the final number or expression that solves the problem. Think step by step before"
        " answering.\n\nFind $x$.",
        "You are given a problem. Think about the problem and provide your reasoning. Place it between <reasoning> and"
        " </reasoning>. Then, provide the final answer (i.e., just one numerical value) between <answer> and"
        " </answer>.\n\nFind $x$.",
        "Find $x$. \\(\\boxed{\\text{Your answer here}}\\)",
    ],
)
def test_the_sentences_of_known_recipes_are_taken_out_wherever_they_stand(prompt):
    assert question_of(prompt) == "Find $x$." and prompt_of(prompt) == f"Find $x$.\n\n{INSTRUCTION}"
    assert unknown_instructions(prompt) == []


def test_a_sentence_in_the_middle_leaves_both_sides():
    sentence = "Please reason step by step, and put your final answer within \\boxed{}."
    assert question_of(f"Let $x = 2$. {sentence} Find $x^2$.") == "Let $x = 2$.\n\nFind $x^2$."


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("Find $x$. Write the final answer in <result> tags.", ["Write the final answer in <result> tags."]),
        ("Find $x$.\nYour response must end in #### and a number.", ["Your response must end in #### and a number."]),
        ("Think step by step, in French. Find $x$.", ["Think step by step, in French."]),
        ("Find $x$. Put your answer in \\boxed{}, as a list.", ["Put your answer in \\boxed{}, as a list."]),
        ("求 $x$。最终答案写在最后一行。", ["最终答案写在最后一行。"]),
        # These belong to the problem: they say which value is asked for, not where to write it.
        ("Find $x$. Express your answer as a common fraction.", []),
        ("Enter your answer in the form $(r,\\theta),$ where $r > 0$.", []),
        ("A lego boxed set costs 5 dollars. What do two cost?", []),
        ("Find the answer to $2 + 2$ in base 3.", []),
    ],
)
def test_a_sentence_that_is_not_known_is_named_and_left_there(prompt, unknown):
    assert unknown_instructions(prompt) == unknown and question_of(prompt) == prompt
