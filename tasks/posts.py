"""A small world of posts and summaries, in which a hidden utility stands for human judgment."""

import itertools
import math
import random
import zlib

from .base import TextTask

WORDS = {
    "who": "sister brother boss roommate neighbour cousin teacher friend uncle aunt mother father "
    "doctor barber landlord nephew niece grandmother",
    "did": "lost broke sold ate read burned took washed hid copied painted returned borrowed "
    "dropped kept buried opened wrapped",
    "thing": "phone bike diary keys essay shoes guitar lunch umbrella letter camera coat hat lamp "
    "ticket wallet piano kite",
    "place": "beach park school library station garden office market zoo kitchen church stadium "
    "museum harbour forest hotel theatre bakery",
    "cause": "bet dream storm party quarrel rumour fever joke promise mistake film wedding game "
    "strike concert flood holiday dare",
    "ask": "forgive call thank visit ignore invite warn help trust tell follow forget pay avoid "
    "praise question hug leave",
    "food": "soup bread rice cake tea cheese fish pizza honey salad pasta jam beans plums",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "mood": "tired hungry cheerful bored nervous proud lonely curious lazy grumpy calm silly",
    "sky": "cloudy sunny windy foggy snowy rainy stormy icy warm mild",
}
WORDS = {kind: words.split() for kind, words in WORDS.items()}
FACTS = [
    "my {who} {did} my {thing}", "in the {place}", "because of a {cause}", "should i {ask} them",
]  # fmt: skip
WORTH = [2.0, 0.6, 0.6, 1.0]  # of each fact in a summary
CHATTER = [
    "sorry for my english", "thanks for reading", "i am new here", "this is a long story",
    "please be kind", "i feel {mood} today", "it was {sky} on {day}", "my {who} likes {food}",
    "my {who} cooks {food} on {day}", "i was in the {place} on {day}", "my {who} is {mood}",
    "on {day} we talked about a {cause}", "i like {food} too", "we had {food} and {food}",
]  # fmt: skip
PREFERENCES = 10**8  # preferences count from here: demonstrations have other posts


def random_words(rng: random.Random) -> dict[str, str]:
    """One word of every kind."""
    return {kind: rng.choice(words) for kind, words in WORDS.items()}


def say(template: str, rng: random.Random) -> str:
    """The template with a random word of the right kind in every gap."""
    return template.format(**random_words(rng))


def vocabulary() -> list[str]:
    texts = [*FACTS, *CHATTER, "it happened they say it was . ? ; summary :"]
    words = [word for text in texts for word in text.split() if "{" not in word]
    return sorted({*words, *itertools.chain(*WORDS.values())})


class Posts(TextTask):
    """A post states four facts among chatter. A good summary states them, briefly, and no more.

    The answer to a post is the complete summary. The reward is the utility of a summary to its
    reader, which copg.py's policies never see: they see a reward model fitted to preferences. One
    event in ten is held out.
    """

    words = vocabulary()

    def problem(self, index):
        rng = random.Random(f"{self.split} {index}")
        while True:
            words = random_words(rng)
            facts = [fact.format(**words) for fact in FACTS]
            is_held_out = zlib.crc32(facts[0].encode()) % 10 == 0
            if is_held_out == (self.split == "test"):
                break
        event, place, cause, ask = facts
        sentences = [event, f"it happened {place}", f"they say it was {cause}"]
        for _ in range(rng.randint(1, 3)):
            sentences.insert(rng.randint(0, len(sentences)), say(rng.choice(CHATTER), rng))
        return f"{' . '.join(sentences)} . {ask} ? summary :", " ; ".join(facts)

    def reward(self, completion, answer):
        """The worth of the facts stated, minus 1 per clause that is no fact, minus 0.1 per word."""
        worth = dict(zip(answer.split(" ; "), WORTH, strict=True))
        stated = completion.split(" ; ")
        utility = sum(worth[clause] for clause in set(stated) if clause in worth)
        utility -= sum(clause not in worth for clause in stated)
        return utility - 0.1 * len(completion.replace(";", "").split())

    def write(self, index: int, writer: int) -> str:
        """A summary of post `index` by a writer of random skill, who may omit, garble or repeat
        facts, and add chatter."""
        rng = random.Random(f"{self.split} {index} writer {writer}")
        skill, clauses = rng.random(), []
        for fact, template in zip(self.problem(index)[1].split(" ; "), FACTS, strict=True):
            if rng.random() < 0.3 + 0.65 * skill:
                if rng.random() < 0.25 * (1 - skill):
                    fact = say(template, rng)
                clauses.append(fact)
                if rng.random() < 0.25 * (1 - skill):
                    clauses.append(fact)
        for _ in range(2):
            if rng.random() < 0.6 * (1 - skill):
                clauses.insert(rng.randint(0, len(clauses)), say(rng.choice(CHATTER), rng))
        return " ; ".join(clauses) or say(CHATTER[0], rng)

    def demonstration(self, index):
        return self.write(index, writer=0)

    def preference(self, index: int) -> tuple[str, list[str]]:
        """Preference `index` as prompt, [preferred summary, other summary].

        Sampled from Bradley-Terry: P(first preferred) = sigmoid(difference of utilities).
        """
        index += PREFERENCES
        prompt, answer = self.problem(index)
        first, second = self.write(index, writer=1), self.write(index, writer=2)
        margin = self.reward(first, answer) - self.reward(second, answer)
        rng = random.Random(f"{self.split} {index} preference")
        swapped = rng.random() > 1 / (1 + math.exp(-margin))
        return prompt, [second, first] if swapped else [first, second]
