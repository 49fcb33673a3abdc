"""Small worlds that stories are told of: each tells what happens in it and asks about where that has led.

A statement changes the world's state, and only the state answers a question. In some worlds the last statement about a
name is all that counts; in others statements act on what earlier ones made (a thing moves with its bearer, a turn adds
to the turns before it, two people change places), so that a reader has to keep the state. A world is one story's.
"""

from __future__ import annotations

from typing import Callable, Protocol

from megatron_implicit.data.tasks.stories.vocabulary import QUESTION, STOP, Vocabulary

PEOPLE = ("ada", "bo", "cyd")
ROOMS = ("mill", "tower", "harbour", "orchard", "bakery")
THINGS = ("lantern", "rope", "coin")
WAYS = ("north", "east", "south", "west")
NUMBERS = ("none", "one", "two", "three")
BAGS = tuple(
    ",".join(thing for place, thing in enumerate(THINGS) if held >> place & 1) or "nothing"
    for held in range(2 ** len(THINGS))
)
"""What a list of things is called, a word each, by the bits of the things in it."""

VOCABULARY = Vocabulary(
    (STOP, QUESTION, *PEOPLE, *ROOMS, *THINGS, *WAYS, *NUMBERS, *BAGS, "yes", "no")
    + tuple("enters takes leaves gives faces turns left right around and swap where is in how many has what".split())
)

Draw = Callable[[int], int]
"""A number below the given one, all equally likely."""


class World(Protocol):
    """The state behind a story."""

    def tell(self, draw: Draw) -> list[int]:
        """Tokens of a statement, which changes the state."""
        ...

    def ask(self, draw: Draw) -> list[int]:
        """Tokens of a question about the state and, as the last one, its answer; something must have been told."""
        ...


_words = VOCABULARY.encode
_people, _rooms, _things, _ways, _numbers, _bags = (
    _words(" ".join(names)) for names in (PEOPLE, ROOMS, THINGS, WAYS, NUMBERS, BAGS)
)
(_stop,), (_question,), _yes_no = _words(STOP), _words(QUESTION), _words("no yes")
_enters, _takes, _leaves, _gives, _faces, _turns, _and, _swap, _is, _in = _words(
    "enters takes leaves gives faces turns and swap is in"
)
_turn_words = _words("right around left")
_where_is, _where_faces, _how_many_has, _what_has = map(_words, ("where is", "where faces", "how many has", "what has"))


def _some(members: list[int], draw: Draw) -> int:
    return members[draw(len(members))]


class People:
    """People go from room to room: where are they? The last statement about a name decides."""

    def __init__(self) -> None:
        self.room: list[int] = [-1] * len(PEOPLE)
        self.known: list[int] = []

    def move(self, person: int, draw: Draw) -> list[int]:
        """Somebody goes to another room."""
        room = draw(len(ROOMS) - (self.room[person] >= 0))
        room += 0 <= self.room[person] <= room
        if self.room[person] < 0:
            self.known.append(person)
        self.room[person] = room
        return [_people[person], _enters, _rooms[room], _stop]

    def tell(self, draw: Draw) -> list[int]:
        """See ``World``."""
        return self.move(draw(len(PEOPLE)), draw)

    def ask(self, draw: Draw) -> list[int]:
        """See ``World``."""
        person = _some(self.known, draw)
        return [*_where_is, _people[person], _question, _rooms[self.room[person]]]


class Claims(People):
    """The same, asked for yes or no, which are equally likely."""

    def ask(self, draw: Draw) -> list[int]:
        """See ``World``."""
        person, truth = _some(self.known, draw), draw(2)
        room = (self.room[person] + (0 if truth else 1 + draw(len(ROOMS) - 1))) % len(ROOMS)
        return [_is, _people[person], _in, _rooms[room], _question, _yes_no[truth]]


class Places(People):
    """People go and change places with one another: where somebody is depends on where the other was."""

    def tell(self, draw: Draw) -> list[int]:
        """See ``World``."""
        if len(self.known) < len(PEOPLE):
            return self.move(_some([p for p in range(len(PEOPLE)) if self.room[p] < 0], draw), draw)
        first = draw(len(PEOPLE))
        if draw(5) == 0:
            return self.move(first, draw)
        second = (first + 1 + draw(len(PEOPLE) - 1)) % len(PEOPLE)
        self.room[first], self.room[second] = self.room[second], self.room[first]
        return [_people[first], _and, _people[second], _swap, _stop]


class Carried(People):
    """People take things, go and leave them: where are the things? It takes two statements to know."""

    def __init__(self) -> None:
        super().__init__()
        self.bearer: list[int] = [-1] * len(THINGS)
        self.place: list[int] = [-1] * len(THINGS)

    def tell(self, draw: Draw) -> list[int]:
        """See ``World``: half of the statements are moves."""
        if not self.known or (len(self.known) > 1 or self._placed()) and draw(2):
            return self.move(draw(len(PEOPLE)), draw)
        thing = draw(len(THINGS))
        if self.bearer[thing] >= 0:
            return self._leave(thing)
        room = self.place[thing]
        there = [person for person in self.known if room < 0 or self.room[person] == room]
        if not there:
            return self.move(draw(len(PEOPLE)), draw)
        self.bearer[thing] = person = _some(there, draw)
        return [_people[person], _takes, _things[thing], _stop]

    def _leave(self, thing: int) -> list[int]:
        person = self.bearer[thing]
        self.place[thing], self.bearer[thing] = self.room[person], -1
        return [_people[person], _leaves, _things[thing], _stop]

    def _placed(self) -> list[int]:
        return [t for t in range(len(THINGS)) if self.bearer[t] >= 0 or self.place[t] >= 0]

    def ask(self, draw: Draw) -> list[int]:
        """See ``World``; about a person while no thing has been taken."""
        placed = self._placed()
        if not placed:
            return super().ask(draw)
        thing = _some(placed, draw)
        room = self.room[self.bearer[thing]] if self.bearer[thing] >= 0 else self.place[thing]
        return [*_where_is, _things[thing], _question, _rooms[room]]


class Owned:
    """Things are taken, given and left: how many has somebody?"""

    def __init__(self) -> None:
        self.held = [0] * len(PEOPLE)
        self.known: list[int] = []

    def tell(self, draw: Draw) -> list[int]:
        """See ``World``: free things are taken; of those that somebody has, half are given to another."""
        thing = draw(len(THINGS))
        owners = [person for person in range(len(PEOPLE)) if self.held[person] >> thing & 1]
        if not owners:
            person = draw(len(PEOPLE))
            self._change(person, thing)
            return [_people[person], _takes, _things[thing], _stop]
        self._change(owners[0], thing)
        if draw(2):
            return [_people[owners[0]], _leaves, _things[thing], _stop]
        other = (owners[0] + 1 + draw(len(PEOPLE) - 1)) % len(PEOPLE)
        self._change(other, thing)
        return [_people[owners[0]], _gives, _people[other], _things[thing], _stop]

    def _change(self, person: int, thing: int) -> None:
        self.held[person] ^= 1 << thing
        if person not in self.known:
            self.known.append(person)

    def ask(self, draw: Draw) -> list[int]:
        """See ``World``."""
        person = _some(self.known, draw)
        return [*_how_many_has, _people[person], _question, _numbers[self.held[person].bit_count()]]


class Bags(Owned):
    """The same, asked for a list, which is one word."""

    def ask(self, draw: Draw) -> list[int]:
        """See ``World``."""
        person = _some(self.known, draw)
        return [*_what_has, _people[person], _question, _bags[self.held[person]]]


class Turns:
    """Two people face some way and turn right, around and left: where do they face now?"""

    def __init__(self) -> None:
        self.way = [-1, -1]

    def tell(self, draw: Draw) -> list[int]:
        """See ``World``."""
        person = draw(2)
        if self.way[person] < 0:
            self.way[person] = draw(len(WAYS))
            return [_people[person], _faces, _ways[self.way[person]], _stop]
        turn = draw(3)
        self.way[person] = (self.way[person] + turn + 1) % len(WAYS)
        return [_people[person], _turns, _turn_words[turn], _stop]

    def ask(self, draw: Draw) -> list[int]:
        """See ``World``."""
        person = _some([p for p in (0, 1) if self.way[p] >= 0], draw)
        return [*_where_faces, _people[person], _question, _ways[self.way[person]]]


WORLDS: dict[str, Callable[[], World]] = {
    "people": People, "things": Carried, "claims": Claims, "counts": Owned, "lists": Bags, "turns": Turns,
    "places": Places,
}  # fmt: skip
"""Worlds by the names of their tasks; a task's number is its place here, counted from 1."""
