"""The metrics file survives kills and resumes; the console prints little into a log and much on a terminal."""

import io
import json
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from retool_jax.clock import AHEAD, Clock, record_compile_wait
from retool_jax.errors import UserError
from retool_jax.metrics import (
    METRICS_FILE,
    MetricsLog,
    Progress,
    format_seconds,
    print_summary,
    read_metrics,
    seconds_left,
    time_rows,
)

SUMMARY = {
    "before": {"accuracy": 0.461, "accuracy_stderr": 0.031, "tool_rate": 0.7, "tool_success": None},
    "after": {"accuracy": 0.883, "accuracy_stderr": 0.02, "greedy_accuracy": 0.97, "response_tokens": 61.25},
    "split": "test",
    "problems": 256,
    "tokens_per_s": {"decode": 31000.0, "update": 21500.0},
    "seconds": {"rollout": 120.0, "update": 60.0, "other": 20.0, "total": 200.0},
    "steps": 80,
}


def write_steps(log: MetricsLog, first: int, last: int, seed: int) -> None:
    for step in range(first, last + 1):
        log.write("rl", step, {"reward_mean": step / 10 + seed})
        if step % 5 == 0:
            log.write("eval", step, {"split": "dev", "accuracy": step / 10 + seed})


def board_events(folder) -> list:
    """Every event of a TensorBoard folder, in the order of writing (files are length-prefixed protobuf records)."""
    from tensorboardX.proto.event_pb2 import Event  # whoever wrote them imported it, without PyTorch

    events = []
    for path in sorted((folder / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def test_a_resumed_file_has_each_step_once(tmp_path):
    with MetricsLog(tmp_path, None) as log:
        write_steps(log, 1, 13, seed=0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "rl", "step": 14, "reward_')  # what kill -9 leaves behind
    with MetricsLog(tmp_path, resume_step=10) as log:
        assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "rl"] == list(range(1, 11))
        write_steps(log, 11, 15, seed=100)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if r["kind"] == "rl"] == list(range(1, 16))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [5, 10, 15]
    assert [r["reward_mean"] > 100 for r in records if r["kind"] == "rl"] == [False] * 10 + [True] * 5
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_drops_what_an_attempt_without_a_checkpoint_left(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, None) as log:
            write_steps(log, 0, 3, seed=0)
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "rl"] == [0, 1, 2, 3]


def test_tensorboard_is_told_from_where_to_forget(tmp_path):
    with MetricsLog(tmp_path, None) as log:
        write_steps(log, 1, 5, seed=0)
    with MetricsLog(tmp_path, resume_step=3) as log:
        write_steps(log, 4, 5, seed=0)
    events = board_events(tmp_path)
    starts = [event.step for event in events if event.session_log.status == event.session_log.START]
    assert starts == [0, 4]
    tags = {value.tag for event in events for value in event.summary.value}
    assert tags == {"rl/reward_mean", "eval/dev/accuracy"}


def test_lines_are_strict_json(tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    with MetricsLog(tmp_path, None) as log:
        log.write("rl", 1, {"loss": float("nan"), "grad_norm": np.float32("inf"), "entropy": np.float32(0.5), "n": 3})
    line = (tmp_path / METRICS_FILE).read_text().strip()
    record = json.loads(line, parse_constant=refuse)
    assert record == {"kind": "rl", "step": 1, "loss": None, "grad_norm": None, "entropy": 0.5, "n": 3}


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"kind": "rl", "step": 1}\n{"kind": \n{"kind": "rl", "step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def show(total: int, start: int, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with Progress("RL", total, start=start, console=console) as bar:
        for step in range(start + 1, total + 1):
            bar.step(step, {"accuracy": 0.5, "tool rate": None, "tokens/s": 21500.0})
            if step == total:
                bar.say("step 60: dev accuracy [50 %]")
    return out.getvalue()


def test_a_log_file_gets_few_lines_and_no_control_characters():
    text = show(total=60, start=20, terminal=False)
    lines = text.splitlines()
    assert 8 <= len(lines) <= 16 and all(character.isprintable() for line in lines for character in line)
    assert lines[0].startswith("RL 24/60  accuracy 0.500  tool rate -  tokens/s 21,500  ")
    assert lines[-2].startswith("RL 60/60") and lines[-1] == "step 60: dev accuracy [50 %]"


def test_a_terminal_gets_a_live_bar():
    text = show(total=60, start=20, terminal=True)
    assert "60/60" in text and "tokens/s 21,500" in text and "step 60: dev accuracy [50 %]" in text


def test_time_left_ignores_the_first_step():
    assert seconds_left((1, 50.0), (1, 50.0), total=10) is None
    assert seconds_left((1, 50.0), (4, 56.0), total=10) == pytest.approx(12.0)
    assert seconds_left((1, 50.0), (10, 68.0), total=10) is None
    assert [format_seconds(s) for s in (7.6, 75, 3700)] == ["0:08", "1:15", "1:01:40"]


def test_the_summary_shows_before_after_speeds_and_times():
    out = io.StringIO()
    print_summary(SUMMARY, Console(file=out, width=80))
    text = out.getvalue()
    for words in ("256 test problems, before and after 80 RL steps", "46.1 ± 3.1 %", "88.3 ± 2.0 %", "decode 31,000"):
        assert words in text
    assert time_rows(SUMMARY) == [("rollout", 120.0, 0.6), ("update", 60.0, 0.3), ("other", 20.0, 0.1)]
    print_summary({}, Console(file=out))  # a run that measured nothing still ends in peace


# ---------------------------------------------------------------------------------------------------------- the clock


def a_program(number: float):
    """A program that was never compiled, not even by an earlier session."""

    def function(x: jax.Array) -> jax.Array:
        for power in range(60):
            x = jnp.sin(x * number) + jnp.cos(x + power)
        return x

    return jax.jit(function)


def test_compilation_is_a_part_of_its_own_inside_of_other_parts_and_outside():
    with closing(Clock()) as clock:
        for inside in (False, True):
            before, began = clock.seconds.get("compile", 0.0), time.perf_counter()
            if inside:
                with clock.part("update"):
                    a_program(time.time())(1.0).block_until_ready()
            else:
                a_program(time.time()).lower(1.0).compile()  # as the engine's warm-up does
            took, compiled = time.perf_counter() - began, clock.seconds["compile"] - before
            assert 0.2 * took < compiled <= took
        assert clock.seconds.keys() == {"compile", "update"} and 0 <= clock.seconds["update"] < 0.8 * took


def test_what_is_compiled_ahead_counts_where_it_is_waited_for():
    with closing(Clock()) as clock, ThreadPoolExecutor(1, AHEAD) as threads:
        threads.submit(a_program(time.time()), 1.0).result()
        assert "compile" not in clock.seconds
        record_compile_wait(1.5)
        assert clock.seconds == {"compile": 1.5}


def test_the_engines_warm_up_counts_as_compilation(make_engine):
    engine = make_engine(slots=3, max_length=80, token_buckets=(16,))
    with closing(Clock()) as clock:
        began = time.perf_counter()
        engine.warm_up()
        assert clock.seconds["compile"] > 0.2 * (time.perf_counter() - began)
