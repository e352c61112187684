"""Calculator annotations become programs with named values, which print what the solution says."""

import contextlib
import io

import pytest

from retool_jax.data.gsm8k import NoProgram, answer_of, program_of, trace_of, twin_of
from retool_jax.data.traces import boxed_answer, conversation

CASES = [
    (
        "She sold 48 clips in April and half as many in May. How many in both?",
        "She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72",
        "clips_in_may = 48 // 2\nclips_altogether = 48 + clips_in_may\nprint(clips_altogether)",
    ),
    (  # money, a per cent sign, thousands
        "A coat for $1,200 is 5% off. What does it cost?",
        "It is 1,200*5% = $<<1,200*5%=60>>60 off.\nIt costs $1,200-$60 = $<<1200-60=1140>>1,140.\n#### 1,140",
        "off = 1200 * (5 / 100)\ndollars = 1200 - off\nprint(round(dollars, 2))",
    ),
    (  # a number that the question holds is not taken for the result of a step
        "He has 6 boxes of 1 and buys 6 more pens. How many?",
        "The boxes hold 6*1 = <<6*1=6>>6 pens.\nIn all 6+6 = <<6+6=12>>12 pens.\n#### 12",
        "pens = 6 * 1\npens_2 = 6 + 6\nprint(pens_2)",
    ),
    (  # decimals, a sign, a rounded step that is found again, and a name that Python has
        "It loses .5 of 7 litres. What is a third of the sum?",
        "It keeps 7-.5=<<7-.5=6.5>>6.5 print\nA third is 6.5/3=<<6.5/3=2.17>>2.17 litres\n"
        "It is <<-2.17+3=0.83>>0.83 litres\n#### 0.83",
        "print_1 = 7 - 0.5\nlitres = print_1 / 3\nlitres_2 = -litres + 3\nprint(round(litres_2, 2))",
    ),
    (  # leading zeros
        "What are 08 dozens?",
        "These are <<08*12=96>>96.\n#### 96",
        "value = 8 * 12\nprint(value)",
    ),
]


@pytest.mark.parametrize(("question", "solution", "program"), CASES)
def test_a_program_has_a_named_value_for_each_step(question, solution, program):
    assert program_of(question, solution) == program
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    assert float(printed.getvalue()) == float(answer_of(solution))


@pytest.mark.parametrize(
    ("solution", "reason"),
    [
        ("It is 7.\n#### 7", "no calculator annotation"),
        ("It is <<x+2=7>>7.\n#### 7", "an annotation that is no arithmetic"),
        ("It is <<2**3=8>>8.\n#### 8", "an annotation that is no arithmetic"),
        ("It is <<print(8)=8>>8.\n#### 8", "an annotation that is no arithmetic"),
        ("It is <<7/0=8>>8.\n#### 8", "a division by zero"),
        ("It is <<(2+=8>>8.\n#### 8", "an annotation that is no arithmetic"),
        ("It is <<True+1=2>>2.\n#### 2", "an annotation that is no arithmetic"),
        ("It is <<1e999-1=2>>2.\n#### 2", "an annotation that is no arithmetic"),
    ],
)
def test_what_is_no_arithmetic_is_no_program(solution, reason):
    with pytest.raises(NoProgram, match=f"^{reason}$"):
        program_of("Q?", solution)


def test_a_trace_and_its_twin_ask_and_answer_the_same():
    question, solution, program = CASES[0]
    trace, twin = trace_of(question, program, "72", "72"), twin_of(question, solution, "72")
    for messages in (trace, twin):
        assert conversation({"messages": messages}) == messages and boxed_answer(messages) == "72"
    assert trace[0] == twin[0] and trace[1]["tool_calls"][0]["function"]["arguments"] == {"code": program}
    assert "<<" not in twin[1]["content"] and "48+24 = 72 clips" in twin[1]["content"] and "####" not in str(twin)
    assert answer_of("It is 7.") == "" and answer_of("#### 1,234") == "1234"
