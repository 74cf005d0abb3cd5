"""What a run has reached, and how long the rest takes."""

import json

import pytest

from nanochat.train.state import SMOOTHING, Pace, TrainState


def test_the_smoothed_loss_is_an_exponential_mean_without_a_bias_at_the_start():
    state = TrainState()
    assert state.loss == 0.0
    for _ in range(3):
        state.advance(4.0, tokens=10, seconds=0.5, position=(1,))
        assert state.loss == pytest.approx(4.0)
    state.advance(2.0, tokens=10, seconds=0.5, position=(2,))
    weights = [SMOOTHING**age for age in (3, 2, 1, 0)]
    assert state.loss == pytest.approx(sum(w * x for w, x in zip(weights, (4, 4, 4, 2), strict=True)) / sum(weights))
    assert (state.step, state.tokens, state.elapsed, state.position) == (4, 40, 2.0, (2,))


def test_a_checkpoint_gives_the_state_back():
    state = TrainState()
    state.advance(4.0, tokens=10, seconds=0.5, position=(3, 1))
    meta = json.loads(json.dumps({"step": state.step, **state.to_meta([state.position])}))
    again = TrainState.from_meta(meta)
    assert meta["positions"] == [[3, 1]] and again.loss == state.loss
    assert (again.step, again.tokens, again.elapsed) == (1, 10, 0.5)


def test_the_first_steps_say_nothing_of_the_time_that_is_left():
    pace = Pace()
    assert [pace.remaining(30.0, done) for done in (0.1, 0.2, 0.3)] == [None, None, None]
    assert pace.remaining(1.0, 0.4) == pytest.approx(6.0)
