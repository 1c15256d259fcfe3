"""Composes the generated training messages from phrases.yaml."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

WEEK = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
DAYS = {name[:3]: name for name in WEEK} | {"today": "today", "tomorrow": "tomorrow"}
ITEM_CHANCE, PROBLEM_CHANCE, DAY_CHANCE = 0.86, 0.72, 0.84
URGENT_CHANCE = 0.42
QUESTION_WORDS = set("can could may is will how what what's have did do got any would".split())

Gold = dict[str, Any]


@dataclass
class Draft:
    """One row in the making: the answer and the pieces of text chosen so far."""

    gold: Gold
    thing: str = ""
    group: str = ""
    when: str = ""


class Composer:
    """Composes messages from the phrase file, one random choice after another."""

    def __init__(self, phrases: dict[str, Any], rng: random.Random) -> None:
        self.p = phrases
        self.rng = rng
        self.groups = {g: words(v) for g, v in phrases["items"].items()}

    # -- small helpers ---------------------------------------------------

    def chance(self, share: float) -> bool:
        """True in the given share of calls."""
        return self.rng.random() < share

    def pick(self, text: str) -> str:
        """One line of a phrase list, with its [a|b] choices made."""
        return self.expand(self.rng.choice(lines(text)))

    def expand(self, text: str) -> str:
        """Replace every [a|b|c] by one of its choices, innermost first."""
        while True:
            found = re.search(r"\[([^\[\]]*)\]", text)
            if not found:
                return text
            choice = self.rng.choice(found.group(1).split("|"))
            text = text[: found.start()] + choice + text[found.end() :]

    # -- the facts -------------------------------------------------------

    def facts(self, intent: str) -> Draft:
        """Draw the answer of one row and the wording of its item."""
        rng = self.rng
        problem = None
        if self.chance(PROBLEM_CHANCE - (0.2 if intent in ("cancel", "reschedule") else 0.0)):
            problem = rng.choice(list(self.p["problems"]))
        fitting = list(self.p["problems"][problem]) if problem else list(self.groups)
        group = rng.choices(fitting, [len(self.groups[g]) for g in fitting])[0]
        item = rng.choice(self.groups[group]) if self.chance(ITEM_CHANCE) else None
        day = rng.choice(list(DAYS)) if self.chance(DAY_CHANCE) else None
        gold: Gold = {
            "intent": intent,
            "item": item,
            "problem": problem,
            "day": day,
            "time": self.time_value(),
            "urgent": self.chance(URGENT_CHANCE),
        }
        return Draft(gold, self.thing(item, group) if item else "", group)

    def time_value(self) -> str | None:
        """Nothing, a part of the day or a clock time between 08:00 and 18:45."""
        roll = self.rng.random()
        if roll < 0.27:
            return None
        if roll < 0.62:
            return self.rng.choice(["morning", "afternoon", "evening"])
        hour = self.rng.randint(8, 18)
        minute = self.rng.choice([0, 0, 0, 0, 0, 30, 30, 30, 15, 45])
        return f"{hour:02d}:{minute:02d}"

    def thing(self, item: str, group: str) -> str:
        """The item with an owner and sometimes a brand or a look."""
        parts = [self.rng.choice(words(self.p["owners"]))]
        if self.chance(0.12):
            parts.append(self.rng.choice(words(self.p["looks"])))
        if self.chance(0.08):
            parts.append(self.rng.choice(words(self.p["brands"][group])))
        return " ".join([*parts, item])

    # -- day and time in words -------------------------------------------

    def day_text(self, day: str, intent: str, plain: bool = False) -> str:
        """A day as people write it; plain leaves out "on" and "next"."""
        name = DAYS[day]
        if day in ("today", "tomorrow"):
            return name
        if self.chance(0.18):
            name = name[:4] if day in ("tue", "thu") and self.chance(0.5) else day
        ahead = "last " if intent == "complaint" else "next "
        lead = "" if plain else self.rng.choice(["on ", "on ", "on ", "this ", ahead, ""])
        return lead + name

    def time_text(self, value: str) -> str:
        """A part of the day or a clock time in words or digits."""
        if value in self.p["time_words"]:
            return self.expand(self.rng.choice(words(self.p["time_words"][value])))
        hour, minute = int(value[:2]), int(value[3:])
        if value == "12:00" and self.chance(0.6):
            return self.rng.choice(["at noon", "noon", "around noon"])
        lead = self.rng.choice(["at ", "at ", "at ", "around ", "about ", "after ", "before ", ""])
        return lead + self.clock(hour, minute)

    def clock(self, hour: int, minute: int) -> str:
        """A clock time without the word before it."""
        names = words(self.p["clock_words"])
        short = hour if hour <= 12 else hour - 12
        spoken = names[short - 1] if self.chance(0.5) else str(short)
        half = {
            15: [f"quarter past {spoken}"],
            30: [f"half past {spoken}", f"{names[short - 1]} thirty"],
            45: [f"quarter to {names[short % 12]}", f"quarter to {short % 12 + 1}"],
        }
        tail = "am" if hour < 12 else "pm"
        if minute and self.chance(0.5):
            return self.rng.choice(half[minute])
        if minute:
            return self.rng.choice([f"{short}:{minute}", f"{hour}:{minute}", f"{short}.{minute}"])
        options = [str(short), spoken, f"{spoken} o'clock", f"{short}{tail}", f"{short} {tail}"]
        return self.rng.choice([*options, f"{hour}:00", f"{short}", spoken])

    def changed(self, old: str, new: str) -> str:
        """A change of mind from one wording to another."""
        return self.pick(self.p["changed"]).format(old=old, new=new)

    def when(self, gold: Gold) -> str:
        """Day and time together, in either order, sometimes corrected."""
        day, time, intent = gold["day"], gold["time"], gold["intent"]
        if day == "today" and time == "evening" and self.chance(0.6):
            return self.rng.choice(["tonight", "this evening"])
        plain = intent == "reschedule"
        switch = self.rng.random()
        parts = []
        if day:
            text = self.day_text(day, intent, plain)
            if switch < 0.12:
                other = self.day_text(self.other_day(day), "", plain)
                text = self.changed(other, self.day_text(day, intent, True))
            parts.append(text)
        if time:
            text = self.time_text(time)
            if day in ("today", "tomorrow") and time in self.p["time_words"] and switch > 0.5:
                parts[0] = "" if day == "today" else "tomorrow"
                text = ("this " if day == "today" else "") + time
            if 0.12 <= switch < 0.17 and ":" in time:
                old = self.rng.choice([t for t in ("10:00", "15:30") if t != time])
                text = self.changed(self.time_text(old), text)
            parts.append(text)
        if len(parts) == 2 and parts[0] and not plain and self.chance(0.25):
            parts.reverse()
        return " ".join(part for part in parts if part)

    def other_day(self, day: str | None) -> str:
        """Any day but this one."""
        return self.rng.choice([d for d in DAYS if d != day])

    # -- sentences -------------------------------------------------------

    def core(self, draft: Draft, with_item: bool) -> str:
        """The sentence that carries the intent, the time and maybe the item."""
        gold = draft.gold
        intent = gold["intent"]
        options = lines(self.p["intents"][intent]["item" if with_item else "bare"])
        if draft.when:
            options = [o for o in options if re.search(r"\{(to|drop|past)\}", o)]
        else:
            options = [o for o in options if "you [said" not in o]
        if gold["problem"] == "service":
            options = [o for o in options if "ruined" not in o]
        text = self.expand(self.rng.choice(options))
        fills = {"thing": draft.thing, "to": draft.when, "drop": "", "past": ""}
        if draft.when:
            fills["drop"] = self.pick(self.p["drop"]).replace("{when}", draft.when)
            fills["past"] = self.past(gold["day"], draft.when).replace("{when}", draft.when)
        if intent == "reschedule":
            fills.update(self.move(gold, draft.when))
        return text.format(**fills)

    def move(self, gold: Gold, when: str) -> dict[str, str]:
        """The old day of a move, where it can be told from the new one."""
        old = ""
        if gold["day"] or (not when and self.chance(0.7)):
            old = self.day_text(self.other_day(gold["day"]), "reschedule", True)
        leads = ("at ", "around ", "about ", "after ", "before ", "in ", "right ", "late ")
        return {
            "to": when if not when or when.startswith(leads) else "to " + when,
            "from": old and "from " + old,
            "booked": old and "for " + old,
        }

    def past(self, day: str | None, when: str) -> str:
        """A wrapper for the day in a complaint; tomorrow cannot be past."""
        options = lines(self.p["past"])
        if day in (None, "today", "tomorrow"):
            options = [o for o in options if "come" in o]
        elif "last " in when:
            options = [o for o in options if "come" not in o]
        return self.expand(self.rng.choice(options))

    def fault(self, draft: Draft, with_item: bool) -> str:
        """A sentence about the fault, or about the item when no fault is named."""
        problem = draft.gold["problem"]
        if not problem:
            return self.pick(self.p["about"]).format(thing=draft.thing) if with_item else ""
        forms = self.p["problems"][problem][draft.group]
        clause, noun = self.pick(forms["clause"]), self.pick(forms["noun"])
        if with_item:
            frame = self.pick(self.p["fault_item"])
            return frame.format(thing=draft.thing, clause=clause, noun=noun)
        if self.chance(0.06):
            return f"not {self.rng.choice(self.denied(draft))}, {noun}"
        if draft.gold["intent"] == "complaint" and self.chance(0.5):
            return clause + self.rng.choice([" again", " again", ", still", " once more"])
        return clause

    def denied(self, draft: Draft) -> list[str]:
        """Other parts the item could have had trouble with."""
        labels = [p for p, forms in self.p["problems"].items() if draft.group in forms]
        known = self.p["denied"]
        parts = [known[p] for p in labels if p in known and p != draft.gold["problem"]]
        return parts or ["what you think"]

    def urgency(self, gold: Gold) -> str:
        """A reason to hurry, a remark that is none, or nothing."""
        event = self.rng.choice(words(self.p["events"]))
        if gold["urgent"]:
            return self.pick(self.p["urgent"]).format(event=event)
        return self.pick(self.p["calm"]) if self.chance(0.3) else ""

    def sentences(self, draft: Draft) -> list[str]:
        """The sentences of the message in their final order."""
        gold = draft.gold
        draft.when = when = self.when(gold)
        in_core = bool(gold["item"]) and self.chance(0.6)
        extra, hurry = "", self.urgency(gold)
        if when and gold["urgent"] and gold["intent"] in ("book", "status", "quote"):
            if self.chance(0.15):
                event = self.rng.choice(words(self.p["events"]))
                extra = self.pick(self.p["urgent_day"]).format(event=event, when=when)
                hurry = ""
        if when and not extra and gold["intent"] == "book" and self.chance(0.25):
            extra = self.pick(self.p["when_alone"]).format(when=when)
        if extra:
            draft.when = ""
        core = self.core(draft, in_core)
        fault = self.fault(draft, bool(gold["item"]) and not in_core)
        if in_core and gold["problem"] and self.chance(0.3):
            noun = self.pick(self.p["problems"][gold["problem"]][draft.group]["noun"])
            core, fault = core.replace(draft.thing, f"{draft.thing} with {noun}", 1), ""
        pieces = [core, extra] if self.chance(0.7) else [extra, core]
        pieces.insert(0 if self.chance(0.4) else 2, fault)
        pieces.insert(0 if self.chance(0.2) else 3, hurry)
        spaced = [re.sub(r"\s+", " ", piece).replace(" ,", ",") for piece in pieces]
        return [piece.strip(" ,") for piece in spaced if piece]

    def message(self, draft: Draft) -> str:
        """The whole message with greeting, ending and untidiness."""
        pieces = self.sentences(draft)
        if self.chance(0.3):
            pieces.insert(0, self.pick(self.p["openers"]).strip())
        if self.chance(0.27):
            pieces.append(self.pick(self.p["closers"]))
        proper = self.chance(0.45)
        join = ". " if proper else self.rng.choice([", ", ". ", " - ", "... ", "! ", " "])
        if proper:
            pieces = [asked(piece[0].upper() + piece[1:]) for piece in pieces]
        text = join.join(pieces).replace("?.", "?").replace("?,", "?").replace("!.", "!")
        if proper:
            text = self.tidy(text)
        else:
            text = self.untidy(text, draft.gold)
        if self.chance(0.05):
            text += " " + self.rng.choice(self.p["emoji"].split())
        return text

    def tidy(self, text: str) -> str:
        """Capitals and an end mark, as in a careful message."""
        text = re.sub(r"\bi\b", "I", text)
        for name in WEEK:
            text = text.replace(name, name.title())
        return text if text[-1] in "?!" else text + self.rng.choice([".", ".", ""])

    def untidy(self, text: str, gold: Gold) -> str:
        """Chat spelling, lost apostrophes and a typo now and then."""
        if self.chance(0.35):
            text = text.replace("'", "")
        if self.chance(0.25):
            for long, short in self.p["short"].items():
                text = re.sub(rf"\b{long}\b", short, text)
        if self.chance(0.3):
            text = self.typo(text, gold)
        if len(text) < 60 and self.chance(0.1):
            return text.upper()
        return text + self.rng.choice(["", "", "", "", "!", "??", ".", "?", "!!"])

    def typo(self, text: str, gold: Gold) -> str:
        """One spoilt word, never the item, a day, a time or a number."""
        names = {*DAYS, *DAYS.values(), *re.split(r"[ -]", gold["item"] or "")}
        keep = names | set(words(self.p["clock_words"]))
        spots = [m for m in re.finditer(r"[a-z]{5,}", text) if m.group() not in keep]
        if not spots:
            return text
        spot = self.rng.choice(spots)
        word, at = spot.group(), self.rng.randrange(1, len(spot.group()) - 2)
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        wrong = self.rng.choice([word[:at] + word[at + 1 :], word[: at + 1] + word[at:], swapped])
        return text[: spot.start()] + wrong + text[spot.end() :]


def words(text: str) -> list[str]:
    """The entries of a comma-separated list."""
    return [word.strip() for word in text.split(",")]


def lines(text: str) -> list[str]:
    """The non-empty lines of a phrase list."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def asked(piece: str) -> str:
    """The piece with a question mark if it opens like a question."""
    first = piece.split()[0].lower()
    return piece + "?" if first in QUESTION_WORDS and piece[-1] not in "?!" else piece
