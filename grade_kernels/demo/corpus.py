"""A small corpus of reviews with sentiment, written by a grammar.

A review is an opening sentence (the prompt) and a completion. The completion holds one or two clauses of a body and a
verdict, and its sentiment is the verdict's. Openings are drawn without looking at the sentiment: neutral ones say who
went where, mixed ones drop a hint ("critics hated this film , so i expected little .") that is as often wrong as right.
So a prompt says what is reviewed and never how the review will end, and a policy trained on the corpus praises half the
time.

The grammar also reads: `verdict_of` parses a completion and returns its true sentiment, which lets the demo tell a
policy that writes good reviews from one that has merely fooled its reward model.

Everything is lower case with spaces between all words and punctuation marks, so that a word-level tokenizer is exact.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from grade_kernels.demo.config import CorpusConfig

__all__ = ["Corpus", "Review", "build_corpus", "tidy", "verdict_of"]

NEGATIVE, POSITIVE = 0, 1


@dataclass(frozen=True)
class Aspect:
    """Something a review can judge: its name, its verb, and the adjectives that suit it, `(negative, positive)`."""

    noun: str
    verb: str
    adjectives: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Topic:
    """Something to review."""

    things: tuple[str, ...]
    visits: tuple[str, ...]
    details: tuple[str, ...]
    aspects: tuple[Aspect, ...]
    verdicts: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Review:
    """One review: `prompt + " " + completion` is its text, `sentiment` is 0 (negative) or 1 (positive)."""

    prompt: str
    completion: str
    sentiment: int

    @property
    def text(self) -> str:
        """The whole review."""
        return f"{self.prompt} {self.completion}"


# ---------------------------------------------------------------------------------------------------------- the words

# Adjectives come in pairs of lists, (negative, positive), by what they can describe.
ANYTHING = (("terrible", "awful", "disappointing"), ("wonderful", "excellent", "lovely"))
TASTE = (("bland", "cold", "greasy", "stale"), ("delicious", "fresh", "tasty", "crisp"))
PEOPLE = (("rude", "careless", "slow", "unhelpful"), ("friendly", "attentive", "polite", "patient"))
PRICE = (("outrageous", "ridiculous", "unfair"), ("fair", "reasonable", "modest"))
STORY = (("dull", "predictable", "silly", "tedious"), ("gripping", "touching", "clever", "moving"))
ROOM = (("dirty", "noisy", "cramped", "shabby"), ("clean", "quiet", "spacious", "cosy"))
DEVICE = (("useless", "faulty", "clumsy", "flimsy"), ("reliable", "fast", "sturdy", "handy"))
SOUND = (("flat", "shrill", "muddy", "lifeless"), ("warm", "clear", "powerful", "beautiful"))


def _aspects(verb: str, nouns: str, adjectives: tuple[tuple[str, ...], tuple[str, ...]]) -> tuple[Aspect, ...]:
    both = (adjectives[0] + ANYTHING[0], adjectives[1] + ANYTHING[1])
    return tuple(Aspect(noun, verb, both) for noun in nouns.split(", "))


TOPICS = (
    Topic(
        things=("film", "comedy", "documentary", "drama"),
        visits=("watched", "saw"),
        details=("about two brothers", "about a lost dog", "set in a small village", "about a long journey"),
        aspects=(
            *_aspects("was", "plot, ending, dialogue, story", STORY),
            *_aspects("was", "music", SOUND),
            *_aspects("were", "jokes, scenes", STORY),
        ),
        verdicts=(
            ("i nearly fell asleep", "two hours of my life are gone", "we left before the end"),
            ("i would watch it again tomorrow", "the time simply flew by", "we clapped at the end"),
        ),
    ),
    Topic(
        things=("restaurant", "cafe", "bistro"),
        visits=("tried", "visited"),
        details=("near the station", "by the harbour", "on the corner", "behind the theatre"),
        aspects=(
            *_aspects("was", "soup, bread, coffee, dessert", TASTE),
            *_aspects("were", "vegetables, noodles", TASTE),
            *_aspects("were", "waiters, cooks", PEOPLE),
            *_aspects("were", "prices", PRICE),
        ),
        verdicts=(
            ("we went home hungry", "i will cook at home from now on", "we will not eat here again"),
            ("we will come back very soon", "every bite was worth it", "i have already booked another table"),
        ),
    ),
    Topic(
        things=("hotel", "guesthouse", "hostel"),
        visits=("booked", "tried"),
        details=("by the lake", "in the old town", "near the airport", "in the mountains"),
        aspects=(
            *_aspects("was", "room, bathroom, lobby, garden", ROOM),
            *_aspects("was", "breakfast", TASTE),
            *_aspects("was", "staff, manager", PEOPLE),
            *_aspects("was", "bill", PRICE),
        ),
        verdicts=(
            ("we checked out a day early", "i did not sleep at all", "next time we will bring a tent"),
            ("we stayed a day longer", "i slept like a baby", "we will spend next summer here"),
        ),
    ),
    Topic(
        things=("book", "novel", "biography"),
        visits=("read", "borrowed"),
        details=("about a famous painter", "set on an island", "about the sea", "by a young author"),
        aspects=(
            *_aspects("was", "plot, ending, writing, opening", STORY),
            *_aspects("were", "characters, chapters, dialogues", STORY),
        ),
        verdicts=(
            ("i gave up halfway through", "it now props up my table", "i fell asleep on every page"),
            ("i could not put it down", "i started again at once", "i read until sunrise"),
        ),
    ),
    Topic(
        things=("phone", "camera", "laptop", "radio"),
        visits=("bought", "ordered"),
        details=("with the red cover", "from the new catalogue", "from a local shop", "with the large buttons"),
        aspects=(
            *_aspects("was", "battery, screen, keyboard, case", DEVICE),
            *_aspects("was", "sound", SOUND),
            *_aspects("were", "buttons, speakers", DEVICE),
            *_aspects("was", "price", PRICE),
        ),
        verdicts=(
            ("i sent it back the same day", "it broke within a week", "i want my money back"),
            ("it still works like new", "i bought a second one", "worth every penny"),
        ),
    ),
    Topic(
        things=("concert", "opera", "festival"),
        visits=("attended", "visited"),
        details=("in the park", "at the town hall", "in the cathedral", "by the river"),
        aspects=(
            *_aspects("was", "orchestra, singing, choir, sound", SOUND),
            *_aspects("was", "staff", PEOPLE),
            *_aspects("were", "seats", ROOM),
            *_aspects("were", "tickets", PRICE),
        ),
        verdicts=(
            ("we walked out early", "my ears still hurt", "the applause was very short"),
            ("we cheered until midnight", "i still hum the songs", "the applause would not stop"),
        ),
    ),
)

VERDICTS = (
    ("i can not recommend it", "please avoid it", "never again", "what a waste of time", "i regret it"),
    ("i recommend it to everyone", "do not miss it", "what a joy", "i am very happy", "a perfect choice"),
)
ADVERBS = ("really", "truly", "absolutely", "very", "simply")
OPINIONS = (
    ("hated", "disliked", "complained about", "was upset by"),
    ("loved", "enjoyed", "praised", "was delighted by"),
)
PERSONS = ("i", "my sister", "my father", "my friend", "everyone")
TIMES = ("last night", "last weekend", "in april", "on monday", "after work", "on my birthday", "two weeks ago")
GROUPS = ("we", "my sister and i", "my brother and i", "a friend and i", "some colleagues and i", "my family and i")
REASONS = ("on a whim", "out of curiosity", "for the first time", "for a birthday", "on the advice of a neighbour")
SOURCES = ("critics", "my neighbours", "my parents", "the local papers", "my colleagues")
HINTS = (
    ("hated", "so i expected little"),
    ("mocked", "so i had my doubts"),
    ("adored", "so i expected a lot"),
    ("praised", "so i was curious"),
)


# -------------------------------------------------------------------------------------------------------- writing it


def _opening(rng: random.Random, topic: Topic) -> str:
    """The prompt: an opening sentence that is drawn without knowing the sentiment."""
    thing, visit, detail = rng.choice(topic.things), rng.choice(topic.visits), rng.choice(topic.details)
    kind = rng.randrange(5)
    if kind == 0:
        return f"{rng.choice(TIMES)} {rng.choice(GROUPS)} {visit} a new {thing} {detail} ."
    if kind == 1:
        return f"{rng.choice(GROUPS)} {visit} this {thing} {detail} {rng.choice(REASONS)} ."
    if kind == 2:
        return f"{rng.choice(TIMES)} i {visit} the {thing} {detail} {rng.choice(REASONS)} ."
    if kind == 3:
        verb, expectation = rng.choice(HINTS)
        return f"{rng.choice(SOURCES)} {verb} the {thing} {detail} , {expectation} ."
    aspect = rng.choice(topic.aspects)
    adjective = rng.choice(aspect.adjectives[rng.randrange(2)])
    return f"{rng.choice(GROUPS)} {visit} a {thing} {detail} . at first the {aspect.noun} seemed {adjective} ."


def _clause(rng: random.Random, aspect: Aspect, sentiment: int) -> str:
    if rng.random() < 0.3:
        return f"{rng.choice(PERSONS)} {rng.choice(OPINIONS[sentiment])} the {aspect.noun}"
    adverb = rng.choice(ADVERBS) + " " if rng.random() < 0.5 else ""
    return f"the {aspect.noun} {aspect.verb} {adverb}{rng.choice(aspect.adjectives[sentiment])}"


def _completion(rng: random.Random, topic: Topic, sentiment: int) -> str:
    first, second = rng.sample(topic.aspects, 2)
    agreeing, contrary = _clause(rng, first, sentiment), _clause(rng, second, 1 - sentiment)
    kind = rng.random()
    if kind < 0.35:
        body = agreeing
    elif kind < 0.75:
        body = f"{agreeing} {rng.choice(('and', ', and'))} {_clause(rng, second, sentiment)}"
    elif kind < 0.9:
        body = f"{contrary} but {agreeing}"
    else:
        body = f"although {contrary} , {agreeing}"
    return f"{body} . {rng.choice(VERDICTS[sentiment] + topic.verdicts[sentiment])} ."


# -------------------------------------------------------------------------------------------------------- reading it


def _any(words: Sequence[str]) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


def _completion_pattern(topic: Topic, sentiment: int) -> re.Pattern[str]:
    """A regular expression for the completions `_completion` can write, save that a first clause may say anything."""

    def clause(mood: int) -> str:
        nouns = _any([aspect.noun for aspect in topic.aspects])
        adverb = f"(?:{_any(ADVERBS)} )?"
        judged = [f"the {a.noun} {a.verb} {adverb}{_any(a.adjectives[mood])}" for a in topic.aspects]
        return f"(?:{_any(PERSONS)} {_any(OPINIONS[mood])} the {nouns}|{'|'.join(judged)})"

    last, first = clause(sentiment), f"(?:{clause(0)}|{clause(1)})"
    body = f"(?:{first} (?:and|, and|but) |although {first} , )?{last}"
    return re.compile(rf"{body} \. {_any(VERDICTS[sentiment] + topic.verdicts[sentiment])} \.")


_PATTERNS = tuple((sentiment, _completion_pattern(topic, sentiment)) for topic in TOPICS for sentiment in (0, 1))


def verdict_of(completion: str) -> int | None:
    """The true sentiment of a completion (0 or 1), or None where it is not well formed.

    Well formed means: words in the grammar's order, about one topic, with adjectives that suit their nouns, and a
    verdict that agrees with the clause before it.
    """
    return next((sentiment for sentiment, pattern in _PATTERNS if pattern.fullmatch(completion)), None)


def tidy(text: str) -> str:
    """Text for human eyes: no space before punctuation, capitals where a sentence starts."""
    text = re.sub(r" ([.,])", r"\1", text).strip()
    return re.sub(r"\bi\b", "I", re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), text))


# --------------------------------------------------------------------------------------------------------- the corpus


@dataclass(frozen=True)
class Corpus:
    """Reviews and prompts, with no prompt in two splits.

    Attributes:
        policy_reviews: what the policy learns to write from (before alignment).
        reward_reviews: labelled reviews for the reward model, on prompts the policy never saw.
        heldout_reviews: labelled reviews on the validation prompts; measures both models.
        train_prompts: prompts for alignment: those of `policy_reviews`.
        validation_prompts: prompts for choosing settings.
        test_prompts: prompts for the final report alone.
    """

    policy_reviews: tuple[Review, ...]
    reward_reviews: tuple[Review, ...]
    heldout_reviews: tuple[Review, ...]
    train_prompts: tuple[str, ...]
    validation_prompts: tuple[str, ...]
    test_prompts: tuple[str, ...]

    def words(self) -> list[str]:
        """Every word of every split, sorted: the vocabulary."""
        reviews = (*self.policy_reviews, *self.reward_reviews, *self.heldout_reviews)
        texts = (*(review.text for review in reviews), *self.test_prompts)
        return sorted({word for text in texts for word in text.split()})

    def fingerprint(self) -> str:
        """A hash of everything in the corpus."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def build_corpus(config: CorpusConfig) -> Corpus:
    """Write the corpus: the same config always gives the same corpus."""
    rng = random.Random(config.seed)
    sizes = (config.policy_prompts, config.reward_prompts, config.validation_prompts, config.test_prompts)
    topic_of: dict[str, Topic] = {}  # a dict keeps the order of insertion, so the slices below are disjoint samples
    while len(topic_of) < sum(sizes):
        topic = rng.choice(TOPICS)
        topic_of.setdefault(_opening(rng, topic), topic)
    prompts = iter(topic_of)
    policy, reward, validation, test = (tuple(next(prompts) for _ in range(size)) for size in sizes)

    def reviews(split: tuple[str, ...], per_prompt: int) -> tuple[Review, ...]:
        # Sentiments alternate, so each prompt is praised exactly as often as it is panned.
        return tuple(
            Review(prompt, _completion(rng, topic_of[prompt], sentiment), sentiment)
            for prompt in split
            for sentiment in (index % 2 for index in range(per_prompt))
        )

    return Corpus(
        policy_reviews=reviews(policy, config.reviews_per_prompt),
        reward_reviews=reviews(reward, config.reviews_per_prompt),
        heldout_reviews=reviews(validation, 2),
        train_prompts=policy,
        validation_prompts=validation,
        test_prompts=test,
    )
