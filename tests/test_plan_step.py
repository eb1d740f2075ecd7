"""The simulated step against cases that were worked out by hand, and against a simulation token by token."""

import random

import pytest

from megatron_espo.plan.step import Decoder, Rollouts, Trainer, one_step_off, simulate_rollouts, synchronous


def test_two_engines_by_hand():
    """Two engines of 2 GPUs, two slots each; a token of n sequences takes 1 + n seconds. Lengths 2, 1, 5, 1, then 3 in the queue.

    Engine 0 gets 2 and 5, engine 1 gets 1 and 1, a token of two sequences takes 3 s. At 3 s both of engine 1's end together: the
    3 begins there alone, 2 s a token, and ends at 9. Engine 0: the 2 ends at 6, the other 3 tokens of the 5 take 2 s each: 12.
    Engine 1 has nothing from 9 to 12: 3 s on 2 GPUs.
    """
    found = simulate_rollouts([2, 1, 5, 1, 3], Decoder(2, 2, 2, 1.0, 1.0))
    assert found == Rollouts(12.0, 6.0, {}, [1, 3, 0, 4, 2])


def test_the_longest_first_ends_earlier():
    """One engine, one slot for each of two engines: 1 and 1 first leave the 4 for the end (5 s), the 4 first does not (4 s)."""
    decoder = Decoder(2, 1, 1, 1.0, 0.0)
    assert simulate_rollouts([1, 1, 4], decoder).seconds == 5.0
    assert simulate_rollouts([1, 1, 4], decoder, order=[2, 0, 1]) == Rollouts(4.0, 2.0, {}, [0, 1, 2])


def test_what_is_not_waited_for_is_carried_over():
    found = simulate_rollouts([1, 2, 6, 3], Decoder(1, 1, 3, 0.5, 0.5), enough=2)
    # Three at once, 2 s a token: the 1 ends at 2, the 2 at 4, when the 6 lacks 4 and the 3, begun at 2, lacks 2.
    assert found == Rollouts(4.0, 0.0, {2: 4.0, 3: 2.0}, [0, 1])


def test_steps_by_hand():
    rollouts = Rollouts(10.0, 8.0, {}, [])
    step = synchronous(rollouts, Trainer(4, 5.0, 0.2), sync_s=1.0)
    assert (step.seconds, step.idle) == (16.0, pytest.approx((8 + 0.2 * 5 * 4) / (16 * 4)))
    # Engines: 2 of 1 GPU; trainer 2 GPUs: 8 idle in rollouts, then the trainer's 10 s less 4 of work, on 2 GPUs.
    step = one_step_off(rollouts, Decoder(2, 1, 1, 1.0, 0.0), Trainer(2, 5.0, 0.2), sync_s=1.0)
    assert (step.seconds, step.idle) == (11.0, pytest.approx((8 + 6 * 2) / (11 * 4)))
    # Training is the longer one: the engines wait 2 s.
    step = one_step_off(rollouts, Decoder(2, 1, 1, 1.0, 0.0), Trainer(2, 12.0, 0.0), sync_s=1.0)
    assert (step.seconds, step.idle) == (13.0, pytest.approx((8 + 2 * 2) / (13 * 4)))


@pytest.mark.parametrize("seed", range(5))
def test_token_by_token_gives_the_same(seed):
    """Engines that do not share a queue any more: every sequence has its slot from the start."""
    draw = random.Random(seed)
    lengths, engines = [draw.randint(1, 30) for _ in range(12)], 3
    ends = []
    for engine in range(engines):
        left, clock = lengths[engine::engines], 0.0
        while left:
            clock += 0.25 + 0.5 * len(left)
            left = [tokens - 1 for tokens in left if tokens > 1]
        ends.append(clock)
    found = simulate_rollouts(lengths, Decoder(engines, 1, 4, 0.25, 0.5))
    assert (found.seconds, found.idle_gpu_s) == (pytest.approx(max(ends)), pytest.approx(sum(max(ends) - end for end in ends)))
