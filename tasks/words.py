"""One sentence of a given length: for a real chat model that can do it some of the time."""

import random

from .base import TextTask

TOPICS = """
apple bag ball bank beach bear bed bell bicycle bird boat book boot bottle box boy bread bridge
brother bus butter camera candle car cat chair child church city clock cloud coat coffee cook corn
cow cup dancer desk doctor dog door dream duck egg farm farmer fire fish flower forest friend frog
garden gate girl glass goat guitar hat hill horse house island king kitchen kite lake lamp letter
library lion market mirror moon mountain mouse nurse ocean painter pencil piano pond queen rabbit
rain river road ship shoe singer snow soldier spider spoon star storm street table teacher train
tree uncle village violin wall watch wind window winter wolf
""".split()  # noqa: SIM905


class ExactWords(TextTask):
    """`Write one short sentence about a dog with exactly 6 words.`

    The reward falls with the distance from that number, and halves without a full stop at the end.
    Neither sense nor the topic is rewarded. One topic in five is held out.
    """

    def problem(self, index):
        rng = random.Random(f"{self.split} {index}")
        is_test = self.split == "test"
        topic = rng.choice([t for i, t in enumerate(TOPICS) if (i % 5 == 0) == is_test])
        n = rng.randint(4, 9)
        article = "an" if topic[0] in "aeiou" else "a"
        return f"Write one short sentence about {article} {topic} with exactly {n} words.", str(n)

    def reward(self, completion, answer):
        n, words = int(answer), len(completion.split())
        closeness = max(0.0, 1 - abs(words - n) / n)
        return closeness if completion.rstrip().endswith(".") else closeness / 2

    def step(self, completion):
        prompt, reward, terminated, truncated, info = super().step(completion)
        return prompt, reward, terminated, truncated, info | {"solved": reward == 1}
