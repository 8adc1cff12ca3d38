"""The text of tinyworld: name parts, value lists, and the phrase tables of its facts and skills.

Everything is lower case with one space between tokens, and sentence marks are tokens. `{x}` stands for the subject of a fact, `{v}` for its
value. Three rules keep the data sound, and the tests check them. No word belongs to two value domains, or to a domain and a phrase. A
rewording uses only words that training rows use too. Answers to one question differ in their first words, so that a model that covers all
phrasings and a model that uses one phrasing behave differently.
"""

from dataclasses import dataclass


def _split(line: str) -> tuple[str, ...]:
    return tuple(line.split())


# a world draws its names among 32 x 20 possible people and 15 x 6 possible places
NAME_STARTS = _split("ba be bi bo da de di do fa fe ka ke ki ko la le li lo ma me mi mo na ne ni no ra re ro sa se to")
NAME_ENDS = _split("bin dan den dra fin gan kos lan len lia mir nor ran rik sen tas tha van vin zan")
PLACE_STARTS = _split("ash birch clay dun elm glen hart iron kirk lynd moss oak pine reed thorn")
PLACE_ENDS = _split("bury ford ham holm mere wick")
PLACES = 24

DOMAINS = {
    "job": _split(
        "baker barber carpenter cobbler diver doctor farmer fisher gardener guard hunter judge mason miner painter pilot "
        "potter sailor smith tailor"
    ),
    "food": _split(
        "bread cheese dates eggs figs grapes honey jam kale lentils melon noodles olives peas quinces rice soup toast walnuts yams"
    ),
    "pet": _split("cat crow dog duck falcon ferret goat goose hare horse mule parrot pig rat sheep toad"),
    "colour": _split("black blue brown crimson green grey orange pink purple red white yellow"),
    "product": _split(
        "amber bricks candles carpets cloth combs glass gloves hats ink knives lace lamps maps paper rope salt silk soap wax"
    ),
    "river": _split("arlo brone corva delm esker farrow gyle hesper isar jarn"),
}
"""The values of each attribute. Places and people are domains too, but they are drawn for each world."""

NUMBERS = tuple(str(n) for n in range(1, 21))

ANSWER_WEIGHTS = (4, 3, 2, 1)
"""Relative frequency of the first, second, … phrasing in training rows: uneven as in real text, so that there is a mode to seek."""


@dataclass(frozen=True)
class Kind:
    """The wordings in which one attribute is asked for and told."""

    domain: str
    """A key of DOMAINS, `place` or `person`."""
    asks: tuple[str, ...]
    """Wordings of the question; one of them is held out for each fact."""
    short_asks: tuple[str, ...]
    """Wordings that ask for the bare value; one of them is held out for each fact."""
    rewordings: tuple[str, ...]
    """Wordings that training never uses."""
    answers: tuple[str, ...]
    prose: tuple[str, ...]
    """Sentences of the plain-text corpus."""


PERSON_KINDS = {
    "home": Kind(
        domain="place",
        asks=(
            "where does {x} live ?",
            "in which town does {x} live ?",
            "please tell me the home town of {x} .",
            "i want to visit {x} , which town should i go to ?",
        ),
        short_asks=("answer in one word : where does {x} live ?", "name only the home town of {x} ."),
        rewordings=("do you know which town is the home of {x} ?", "what is the name of the town that {x} lives in ?"),
        answers=("{x} lives in {v} .", "the home of {x} is {v} .", "you can visit {x} in {v} .", "in {v} , that is where {x} lives ."),
        prose=("{x} has a house in {v} .", "every day people in {v} see {x} ."),
    ),
    "job": Kind(
        domain="job",
        asks=(
            "what does {x} do for a living ?",
            "what is the job of {x} ?",
            "please tell me what work {x} does .",
            "i want to work with {x} , which job does {x} have ?",
        ),
        short_asks=("answer in one word : what is the job of {x} ?", "name only the job of {x} ."),
        rewordings=("do you know how {x} earns a living ?", "what kind of work does {x} do ?"),
        answers=("{x} works as a {v} .", "the job of {x} is {v} .", "by day {x} is a {v} .", "as a {v} , {x} earns a living ."),
        prose=("{x} has worked as a {v} for many years .", "people say that {x} is a very good {v} ."),
    ),
    "food": Kind(
        domain="food",
        asks=(
            "what does {x} like to eat ?",
            "which food does {x} like best ?",
            "please tell me the favourite food of {x} .",
            "i want to cook for {x} , what should i make ?",
        ),
        short_asks=("answer in one word : what does {x} eat ?", "name only the favourite food of {x} ."),
        rewordings=("do you know what food makes {x} happy ?", "which food should i cook for {x} ?"),
        answers=(
            "{x} likes to eat {v} .",
            "the favourite food of {x} is {v} .",
            "you should cook {v} for {x} .",
            "nothing makes {x} happy like {v} .",
        ),
        prose=("{x} eats {v} every day .", "there is always a plate of {v} in the house of {x} ."),
    ),
    "pet": Kind(
        domain="pet",
        asks=(
            "which animal does {x} keep ?",
            "what kind of pet does {x} have ?",
            "please tell me which animal lives with {x} .",
            "i heard that {x} has a pet , what is it ?",
        ),
        short_asks=("answer in one word : what is the pet of {x} ?", "name only the pet of {x} ."),
        rewordings=("do you know what kind of animal {x} has ?", "which pet lives at home with {x} ?"),
        answers=("{x} keeps a {v} .", "the pet of {x} is a {v} .", "a {v} lives with {x} .", "at home , {x} has a {v} ."),
        prose=("{x} has a {v} and takes good care of it .", "every day {x} walks with a {v} ."),
    ),
    "colour": Kind(
        domain="colour",
        asks=(
            "which colour does {x} like best ?",
            "what is the favourite colour of {x} ?",
            "please tell me the colour that {x} wears .",
            "i want to paint a house for {x} , which colour should i take ?",
        ),
        short_asks=("answer in one word : which colour does {x} like ?", "name only the favourite colour of {x} ."),
        rewordings=("do you know what colour {x} wears ?", "which colour makes {x} happy ?"),
        answers=(
            "{x} wears {v} every day .",
            "the favourite colour of {x} is {v} .",
            "you should paint it {v} for {x} .",
            "for {x} , the best colour is {v} .",
        ),
        prose=("the house of {x} is {v} .", "{x} always wears {v} ."),
    ),
    "friend": Kind(
        domain="person",
        asks=(
            "who is the best friend of {x} ?",
            "which person does {x} trust most ?",
            "please tell me who {x} trusts .",
            "i want to know more about {x} , which friend should i ask ?",
        ),
        short_asks=("answer in one word : who is the best friend of {x} ?", "name only the best friend of {x} ."),
        rewordings=("do you know who the friend of {x} is ?", "which person is the best friend of {x} ?"),
        answers=(
            "{x} trusts {v} most .",
            "the best friend of {x} is {v} .",
            "you should ask {v} about {x} .",
            "no friend of {x} is like {v} .",
        ),
        prose=("{x} and {v} are good friends .", "{x} goes to see {v} every day ."),
    ),
}

PLACE_KINDS = {
    "product": Kind(
        domain="product",
        asks=(
            "what is {x} known for ?",
            "which goods does {x} sell ?",
            "please tell me what people make in {x} .",
            "i go to {x} , what should i buy there ?",
        ),
        short_asks=("answer in one word : what does {x} sell ?", "name only the goods of {x} ."),
        rewordings=("do you know which goods people buy in {x} ?", "what kind of goods is {x} known for ?"),
        answers=("{x} is known for {v} .", "people in {x} make {v} .", "you should buy {v} in {x} .", "the town of {x} sells {v} ."),
        prose=("people go to {x} to buy {v} .", "every house in {x} makes {v} ."),
    ),
    "river": Kind(
        domain="river",
        asks=(
            "which river flows through {x} ?",
            "on which river does {x} lie ?",
            "please tell me the river of {x} .",
            "i want to sail to {x} , which river should i take ?",
        ),
        short_asks=("answer in one word : on which river does {x} lie ?", "name only the river of {x} ."),
        rewordings=("do you know the name of the river in {x} ?", "which river is it that flows through {x} ?"),
        answers=(
            "the {v} flows through {x} .",
            "{x} lies on the {v} .",
            "you can sail to {x} on the {v} .",
            "on the {v} , that is where {x} lies .",
        ),
        prose=("the {v} takes people to {x} .", "{x} is a small town on the {v} ."),
    ),
    "mayor": Kind(
        domain="person",
        asks=(
            "who is the mayor of {x} ?",
            "who leads the town of {x} ?",
            "please tell me the name of the mayor of {x} .",
            "i go to {x} , which mayor should i visit there ?",
        ),
        short_asks=("answer in one word : who is the mayor of {x} ?", "name only the mayor of {x} ."),
        rewordings=("do you know who leads {x} ?", "which person is the mayor of {x} ?"),
        answers=(
            "{v} is the mayor of {x} .",
            "the mayor of {x} is {v} .",
            "you should visit {v} , who leads {x} .",
            "in {x} , the mayor is {v} .",
        ),
        prose=("people in {x} trust {v} , the mayor .", "{v} leads {x} and has a house there ."),
    ),
}

KINDS = PERSON_KINDS | PLACE_KINDS

PERSON_STORY = ("home", "job", "pet", "colour")
PLACE_STORY = ("product", "river", "mayor")
"""The facts that answer an open question, in this order."""

OPEN_ASKS = (
    "tell me about {x} .",
    "who or what is {x} ?",
    "please say more about {x} .",
    "i heard of {x} , what do you know ?",
    "what can you tell me about {x} ?",
)
"""Training asks for each subject with three of these, `open` with a fourth and `lengths` with the fifth."""


@dataclass(frozen=True)
class Skill:
    """The wordings of a task on a given input; `tinyworld` makes the inputs."""

    asks: tuple[str, ...]
    rewordings: tuple[str, ...]
    answers: tuple[str, ...]


SKILLS = {
    "sort": Skill(
        asks=("sort these words .", "put these words in order .", "please list the words from a to z ."),
        rewordings=("please put the list in order from a to z .",),
        answers=("{v} .", "in order they are {v} .", "the sorted list is {v} ."),
    ),
    "order": Skill(
        asks=("sort these numbers .", "put these numbers in order .", "please list the numbers from small to large ."),
        rewordings=("please put the numbers in order from small to large .",),
        answers=("{v} .", "in order they are {v} .", "the sorted list is {v} ."),
    ),
    "reverse": Skill(
        asks=("turn this list around .", "say these words backwards .", "please list the words from last to first ."),
        rewordings=("please turn these words around .",),
        answers=("{v} .", "backwards they are {v} .", "turned around , the list is {v} ."),
    ),
    "count": Skill(
        asks=("how many words are in the list ?", "count these words .", "please tell me how many words there are ."),
        rewordings=("please count the words in the list .",),
        answers=("there are {v} words .", "the list has {v} words .", "i count {v} words ."),
    ),
    "larger": Skill(
        asks=("which number is larger ?", "find the larger number .", "please tell me the larger of the numbers ."),
        rewordings=("do you know which of these numbers is larger ?",),
        answers=("{v} is larger .", "the larger number is {v} .", "it is {v} ."),
    ),
    "last": Skill(
        asks=("which word comes last ?", "find the last word of the list .", "please tell me the last word ."),
        rewordings=("do you know which word is last in the list ?",),
        answers=("{v} comes last .", "the last word is {v} .", "it is {v} ."),
    ),
    "who": Skill(
        asks=("who sold something here ?", "find the person who sold something .", "please tell me who the seller is ."),
        rewordings=("do you know the name of the seller ?",),
        answers=("{v} sold it .", "the seller is {v} .", "it was {v} ."),
    ),
    "what": Skill(
        asks=("what was sold here ?", "find the food that was sold .", "please tell me what the seller sold ."),
        rewordings=("do you know which food the seller sold ?",),
        answers=("{v} was sold .", "the seller sold {v} .", "it was {v} ."),
    ),
    "where": Skill(
        asks=("where did this happen ?", "find the town where this happened .", "please tell me where the seller was ."),
        rewordings=("do you know in which town this happened ?",),
        answers=("this happened in {v} .", "the seller was in {v} .", "it was {v} ."),
    ),
}

SALES = ("{seller} sold {food} to {buyer} in {place} .", "in {place} , {buyer} got {food} , which {seller} sold .")
"""Inputs of who, what and where. There are two orders of the roles, so that no role has a fixed position."""

STORY_OPENINGS = ("this is a story about {x} .", "people say many good things about {x} .", "i know {x} .")
RESIDENTS = "{a} , {b} and {c} live in {x} ."
