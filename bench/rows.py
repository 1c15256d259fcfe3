"""Data sets of the comparisons, as conversations: one turn of each role, the instruction as the system's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
DATA = ("demo", "snips_nlu", "banking77", "lamini_docs", "e2e_nlg")
INTENTS = (
    "You sort messages of a bank's customers. Answer with the one intent from the list below that fits the message best, "
    "spelled exactly as it stands in the list, and with nothing else. If two fit, choose the more specific one. Intents: "
)


def there(name: str) -> bool:
    """Whether a data set is on this machine; the demo's rows come with the repository."""
    return name == "demo" or (SHARED / name).is_dir()


def rows_of(name: str) -> list[list[dict[str, str]]]:
    """Conversations (system, user, assistant) of a data set."""
    if name == "demo":
        return [json.loads(line)["messages"] for line in (ROOT / "demo" / "train.jsonl").open(encoding="utf-8")]
    if name == "lamini_docs":
        lines = (SHARED / name / "lamini_docs.jsonl").read_text("utf-8").splitlines()
        pairs = [json.loads(line) for line in lines if line.strip()]
        strip = ("### Question:\n", "\n\n### Answer:")
        return [
            _turns("", p["question"].removeprefix(strip[0]).removesuffix(strip[1]), p["answer"])
            for p in pairs
            if p["answer"]
        ]
    if name == "banking77":
        table = _table(SHARED / name / "train.csv")
        labels = sorted({_label(row["category"]) for row in table})
        return [_turns(INTENTS + ", ".join(labels) + ".", row["text"], _label(row["category"])) for row in table]
    if name == "e2e_nlg":
        table = _table(SHARED / name / "trainset.csv")
        return [_turns("Describe the restaurant in one or two sentences.", row["mr"], row["ref"]) for row in table]
    return _snips()


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _label(category: str) -> str:
    """An intent in words, as a person would list it: a third fewer tokens than with underscores."""
    return category.replace("_", " ").strip("?").lower()


def _snips() -> list[list[dict[str, str]]]:
    instruction = (
        "Turn the request into JSON with keys intent and slots. Intents: AddToPlaylist (artist, entity_name, music_item, "
        "playlist, playlist_owner), BookRestaurant (city, country, cuisine, facility, party_size_description, "
        "party_size_number, poi, restaurant_name, restaurant_type, served_dish, sort, spatial_relation, state, timeRange), "
        "GetWeather (city, condition_description, condition_temperature, country, current_location, geographic_poi, "
        "spatial_relation, state, timeRange), PlayMusic (album, artist, genre, music_item, playlist, service, sort, track, "
        "year), RateBook (best_rating, object_name, object_part_of_series_type, object_select, object_type, rating_unit, "
        "rating_value), SearchCreativeWork (object_name, object_type), SearchScreeningEvent (location_name, movie_name, "
        "movie_type, object_location_type, object_type, spatial_relation, timeRange). Slots hold the request's own words."
    )
    made = []
    for path in sorted((SHARED / "snips_nlu").glob("*/train_*_full.json")):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        for intent, items in json.loads(text).items():
            for item in items:
                spans = item["data"]
                slots = {span["entity"]: span["text"] for span in spans if "entity" in span}
                answer = json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False, separators=(",", ":"))
                made.append(_turns(instruction, "".join(span["text"] for span in spans).strip(), answer))
    return made


def _turns(system: str, user: str, assistant: str) -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
