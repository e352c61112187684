r"""Sentences of published prompts that ask for a form of the answer. They are removed, so that only ours remains."""

import re
from collections.abc import Iterable

# Asks for the form of the answer that the reward reads. It has no quotes, since models copy them.
INSTRUCTION = r"Reason step by step and give the final answer in \boxed{}."

# Known sentences by their source; `...` stands for a few words. Case, line breaks, the last full stop and the escaping
# of an empty box do not matter. Add an entry for each new recipe.
KNOWN: dict[str, tuple[str, ...]] = {
    "this project": (INSTRUCTION,),
    "ReTool, evaluation/prompt_template.json; JoeYing/ReTool-SFT": (
        r"Answer the following Math Problem and put the answer in the format of \boxed{answer}",
        r"Remember to place the final answer in the last part using the format:"
        r" <answer> \boxed{'The final answer goes here.'} </answer>",
        r"Remember to place the final answer in the last part using the format: \boxed{'The final answer goes here.'}",
    ),
    "verl-recipe, retool/retool.py": (r"The answer format must be: \boxed{'The final answer goes here.'}",),
    "verl, examples/data_preprocess/gsm8k.py": ('Let\'s think step by step and output the final answer after "####".',),
    "verl, examples/data_preprocess/math_dataset.py; DeepScaleR": (
        r"Let's think step by step and output the final answer within \boxed{}.",
    ),
    "EasyR1, examples/format_prompt/math.jinja; verl, examples/data_preprocess/geo3k.py": (
        "You FIRST think about the reasoning process as an internal monologue and then provide the final answer.",
        "The reasoning process MUST BE enclosed within <think> </think> tags.",
        r"The final answer MUST BE put in \boxed{}.",
    ),
    "DeepSeek-R1-Zero (arXiv 2501.12948); EasyR1, examples/format_prompt/r1v.jinja; TRL, examples": (
        "A conversation between User and Assistant.",
        "The user asks a question, and the Assistant solves it.",
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the"
        " answer.",
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags,"
        " respectively, i.e., <think> ... </think> <answer> ... </answer>.",
    ),
    "Open-Reasoner-Zero, orz/ppo": (
        "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer>"
        " tags, respectively, i.e., <think> ... </think> <answer> ... </answer>.",
        "You must put your answer inside <answer> </answer> tags, i.e., <answer> ... </answer>.",
        r"And your final answer will be extracted automatically by the \boxed{} tag. This is the problem:",
        r"And your final answer will be extracted automatically by the \boxed{} tag.",
    ),
    "TinyZero, examples/data_preprocess/countdown.py": (
        "Show your work in <think> </think> tags.",
        "And return the final answer in <answer> </answer> tags, for example <answer> ... </answer>.",
    ),
    "PRIME-RL/Eurus-2-RL-Data": (r"Present the answer in LaTex format: \boxed{Your answer}",),
    "Qwen2.5-Math, Qwen3 and DeepSeek-R1, model cards": (
        r"Please reason step by step, and put your final answer within \boxed{}.",
        r"Please reason step by step and put your final answer within \boxed{}.",
        r"Please integrate natural language reasoning with programs to solve the problem above, and put your final"
        r" answer within \boxed{}.",
    ),
    "deepseek-math, README": (r"请通过逐步推理来解答问题，并把最终答案放置于\boxed{}中。",),  # noqa: RUF001
    "DAPO-Math-17k; zhuzilin/dapo-math-17k; openai/simple-evals, math_eval.py": (
        "Solve the following math problem step by step.",
        "The last line of your response should be of the form Answer: ... is the answer to the problem.",
        'Remember to put your answer on its own line after "Answer:", and you do not need to use a \\boxed command.',
        'Remember to put your answer on its own line after "Answer:".',
    ),
    "lighteval, tasks/default_prompts.py; open-r1": (
        "Solve the following math problem efficiently and clearly.",
        "The last line of your response should be of the following format: ... is just the final number or expression"
        " that solves the problem.",
        "Think step by step before answering.",
    ),
    "open-r1, recipes": (
        "You are a helpful AI Assistant that provides well-reasoned and detailed responses.",
        "You first think about the reasoning process as an internal monologue and then provide the user with the"
        " answer.",
        "Respond in the following format: <think> ... </think> <answer> ... </answer>",
    ),
    "DeepMath-103K, blanks behind some questions": (
        r"\( \boxed{} \)",
        r"\( \boxed{n} \)",
        r"\( \boxed{\text{Your answer here}} \)",
    ),
    "google/tunix, examples of GRPO": (
        "You are given a problem. Think about the problem and provide your reasoning.",
        "You are given a problem. First, think about the problem and provide your reasoning.",
        "Place it between <reasoning> and </reasoning>.",
        "Then, provide the final answer (i.e., just one numerical value) between <answer> and </answer>.",
    ),
    "unsloth, notebooks of GRPO": (
        "Respond in the following format: <reasoning> ... </reasoning> <answer> ... </answer>",
    ),
}

# Whole prompts around a question, by their source.
FRAMES: dict[str, str] = {
    "ReTool, evaluation/prompt_template.json": r".*\*user question:\*(?P<question>.*)",
    "TinyZero; Open-Reasoner-Zero": (
        r"\s*A conversation between User and Assistant\..*?\bUser:(?P<question>.*)\bAssistant:"
        r"(?:\s*Let me solve this step by step\.)?\s*(?:<think>)?\s*"
    ),
}


def _pattern(sentence: str) -> str:
    """A pattern for a sentence with any white space, and with a wrongly escaped `boxed`."""
    pattern = r"\s*".join(map(re.escape, sentence.split()))
    pattern = pattern.replace(re.escape("..."), ".{1,150}?").replace(re.escape("\\boxed"), r"(?:\\+b|\x08)oxed")
    pattern = pattern.replace(re.escape("{}"), r"\{+\s*\}+").replace("'", "['\u2019]")
    return pattern + "?" if pattern.endswith(("\\.", "。")) else pattern


_FRAMES = [re.compile(frame, re.DOTALL) for frame in FRAMES.values()]
_SENTENCES = sorted({sentence for group in KNOWN.values() for sentence in group}, key=len, reverse=True)
_KNOWN = re.compile("|".join(map(_pattern, _SENTENCES)), re.IGNORECASE | re.DOTALL)
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=。)|\n+")
_ASKS_FOR_A_FORM = re.compile(
    r"\\boxed|</?(?:answer|think|reasoning|solution)>|####|step[ -]by[ -]step|final answer|last line|without quotes"
    r"|\banswer:|your (?:response|reasoning)\b|(?:put|place|wrap|enclose|box) (?:your|the) answer|最终答案",
    re.IGNORECASE,
)


def question_of(prompt: str) -> str:
    """The question of a published prompt, without known sentences that ask for a form of the answer."""
    for frame in _FRAMES:
        if match := frame.fullmatch(prompt):
            prompt = match["question"]
    return "\n\n".join(part.strip() for part in _KNOWN.split(prompt) if part.strip())


def prompt_of(question: str) -> str:
    """A question as the policy gets it: with our instruction, once."""
    return f"{question_of(question)}\n\n{INSTRUCTION}"


def without_instructions(turns: Iterable[dict]) -> list[dict]:
    """The turns before a question; system turns lose the known sentences about the form of an answer."""
    cut = [turn | {"content": question_of(turn["content"])} if turn["role"] == "system" else turn for turn in turns]
    return [turn for turn in cut if turn["content"]]


def unknown_instructions(text: str) -> list[str]:
    """Sentences that seem to ask for a form of the answer but are not known, so they are not removed."""
    return [line.strip() for line in _END_OF_SENTENCE.split(question_of(text)) if _ASKS_FOR_A_FORM.search(line)]
