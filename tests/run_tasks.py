"""A task for the tests of runs: an untrained model gets some rewards, and not all of them."""

import gymnasium

from common import TextTask


class Digits(TextTask):
    def problem(self, index):
        return f"{index % 10}?", "x"

    def reward(self, completion, answer):
        return sum(map(len, completion.split("\ufffd"))) / 8


gymnasium.register("Digits-v0", entry_point=Digits)
