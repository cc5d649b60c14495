"""An orderly end: a signal is never lost, whichever rank it reaches and whenever."""

import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from mmft.train.callbacks import Interrupt

STATE = SimpleNamespace(global_step=1, max_steps=9)


def step_end(interrupt: Interrupt) -> TrainerControl:
    control = TrainerControl(should_evaluate=True)
    interrupt.on_step_end(None, STATE, control)
    return control


def test_a_signal_saves_and_stops_after_the_step() -> None:
    interrupt = Interrupt()
    with interrupt.installed():
        signal.raise_signal(signal.SIGTERM)
        control = step_end(interrupt)
    assert control.should_save and control.should_training_stop and not control.should_evaluate
    assert interrupt.received == signal.SIGTERM


def test_a_signal_that_comes_while_the_ranks_agree_stops_the_run_after_the_next_step() -> None:
    def agree(claim: int) -> int:
        if not asked:
            asked.append(True)
            signal.raise_signal(signal.SIGTERM)  # too late for this agreement
        return claim

    asked: list[bool] = []
    interrupt = Interrupt(agree)
    with interrupt.installed():
        assert not step_end(interrupt).should_training_stop
        assert step_end(interrupt).should_training_stop


def test_what_another_rank_was_told_stops_this_one_too() -> None:
    interrupt = Interrupt(lambda claim: max(claim, signal.SIGINT))
    assert step_end(interrupt).should_training_stop
    assert interrupt.received == signal.SIGINT


def test_a_second_signal_stops_at_once() -> None:
    interrupt = Interrupt()
    with interrupt.installed():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
