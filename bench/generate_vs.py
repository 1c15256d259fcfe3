"""Answers side by side: luthier against transformers' batched `generate`, same prompts, same weights, one process.

    python bench/generate_vs.py                                                     a tiny run that shows that it works
    python bench/generate_vs.py --data banking77 --rows 500 --rounds 3 --tune 40 --out docs/benchmarks/generate.json

Data sets: demo and snips_nlu (a long instruction), banking77 (a list of 77 labels, 400 tokens), e2e_nlg (a short
instruction) and lamini_docs (none: what suits us least). `--tune` trains a LoRA for so many steps first, so that answers
have the task's lengths; `--run` takes a finished run's adapter instead. Figures are added to `--out`, one entry per data set.

Arms, in alternating order, greedy, the same prompts and `max_new_tokens`:
  transformers           the adapter attached as PEFT leaves it; rows sorted by length, padded on the left, best batch size
                         of those tried
  transformers_merged    the same on weights with the adapter merged in: the claim is measured against this arm
  llama_cpp              llama-cpp-python, where it is installed and `--gguf` names the merged model in equal precision
  luthier_attached       luthier without folding
  luthier                the default path: where there are rows enough, the adapter is folded in and taken out again inside
                         the measured time
  luthier_unshared       the default path with no beginnings shared and no guesses: isolates the two
  luthier_choices        the exact best of the training answers, where these are a closed set: another way to the answer
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rows import DATA, rows_of

RANK, RATE, BATCH = 16, 1e-3, 16
CLOSED = 500  # distinct answers up to which a set counts as closed
TRIED = 16  # rows that batch sizes are tried on


class Bench:
    """The prompts, the tuned model in both libraries' hands, and what every arm does with them."""

    def __init__(self, asked: argparse.Namespace) -> None:
        from luthier import registry
        from luthier.model import catalog, load
        from luthier.text.tokenizer import Tokenizer

        self.asked = asked
        folder = catalog.locate(asked.model)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.template = registry.make("templates", asked.template)
        table = rows_of(asked.data)
        random.Random(asked.seed).shuffle(table)
        held, self.train = table[: asked.rows], table[asked.rows : asked.rows + max(200, BATCH * asked.tune)]
        rendered = self._rendered(held)
        self.prompts = [row.ids[: row.prompt_length] for row in rendered]
        self.golds = [turns[-1]["content"] for turns in held]
        lengths = sorted(len(row.ids) - row.prompt_length for row in [*rendered, *self._rendered(self.train[:200])])
        self.new = asked.new or max(8, int(1.25 * lengths[int(0.99 * (len(lengths) - 1))]) + 1)
        base = load.load_model(folder, dtype=asked.dtype)
        method = registry.make("methods", {"name": "lora", "rank": RANK})
        if asked.run:
            self.adapted = method.load(base, Path(asked.run) / "adapter")
        else:
            self.adapted = self._tuned(base, method)
        self.model = self.adapted.model.eval()

    def _rendered(self, table: Sequence[Sequence[dict[str, str]]]) -> Any:
        from luthier.records import Example, Message, Origin
        from luthier.text.render import render_all

        examples = [
            Example(tuple(Message(t["role"], t["content"]) for t in turns), Origin(f"{self.asked.data}:{place}"))
            for place, turns in enumerate(table)
        ]
        return render_all(examples, self.template, self.tokenizer).rendered

    def _tuned(self, base: Any, method: Any) -> Any:
        """A LoRA after `--tune` steps; the adapter is as wide and as slow without any."""
        from luthier import registry
        from luthier.spec import TrainSpec
        from luthier.training.feed import ShuffledFeed
        from luthier.training.loop import Training

        adapted = method.attach(base, seed=0)
        if self.asked.tune:
            settings = TrainSpec(
                max_steps=self.asked.tune, batch_size=BATCH, learning_rate=RATE, patience=None, tokens_per_pack=2048
            )
            feed = ShuffledFeed(
                [[row] for row in self._rendered(self.train)], batch_size=BATCH, seed=0, epochs=1,
                max_steps=self.asked.tune, budget=2048, share=True,
            )  # fmt: skip
            for _ in Training(adapted, registry.make("objectives", "sft"), feed, settings, method=method, dev_packs=[]):
                pass
        return adapted

    def luthier(self, *, least: int | None = None, guess: bool = True) -> list[str]:
        """luthier's answers; `least` tokens of work from which the adapter is folded in, else luthier's own measure."""
        from luthier.adapt.folded import WORTH_TOKENS, folded
        from luthier.model.generate import generate

        with folded(self.model, self.prompts, self.new, least=WORTH_TOKENS if least is None else least) as folding:
            if folding.why:
                raise SystemExit(f"not folded: {folding.why}")
            found = generate(
                self.model, self.prompts, decode=self._text, stop_ids=self.tokenizer.stop_ids, guess=guess,
                max_new_tokens=self.new, batch_size=self.asked.together,
            )  # fmt: skip
        return [answer.text for answer in found]

    def choices(self) -> list[str]:
        """The exact best of the answers that training rows have."""
        from luthier.adapt.folded import folded
        from luthier.model.choices import choose

        with folded(self.model, self.prompts, self.new):
            found = choose(self.model, self.prompts, self._labels(), batch_size=self.asked.together)
        return [self._closed[label] for label, _ in found]

    def _labels(self) -> list[tuple[int, ...]]:
        distinct = {turns[-1]["content"]: turns for turns in self.train}
        self._closed = sorted(distinct)
        rows = self._rendered([distinct[label] for label in self._closed])
        return [row.ids[row.prompt_length :] for row in rows]

    def transformers(self, batch: int, prompts: Sequence[Sequence[int]] | None = None) -> list[str]:
        """transformers' answers: rows sorted by length, padded on the left, in batches."""
        import torch
        from transformers import GenerationConfig

        prompts = self.prompts if prompts is None else prompts
        stops = sorted(self.tokenizer.stop_ids)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.new, eos_token_id=stops, pad_token_id=stops[0], use_cache=True
        )
        order, texts = sorted(range(len(prompts)), key=lambda row: len(prompts[row])), [""] * len(prompts)
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            longest = max(len(prompts[row]) for row in rows)
            ids = torch.full((len(rows), longest), stops[0])
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, longest - len(prompts[row]) :] = torch.tensor(list(prompts[row]))
                mask[place, longest - len(prompts[row]) :] = 1
            with torch.inference_mode():
                out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for place, row in enumerate(rows):
                answer = out[place, longest:].tolist()
                end = next((at for at, token in enumerate(answer) if token in self.tokenizer.stop_ids), len(answer))
                texts[row] = self._text(answer[:end])
        return texts

    def llama_cpp(self) -> list[str]:
        """llama.cpp's answers, row by row; it keeps the beginning that a prompt shares with the one before."""
        found = []
        for prompt in self.prompts:
            answer: list[int] = []
            for token in self.llama.generate(list(prompt), temp=0.0):
                if token in self.tokenizer.stop_ids or len(answer) == self.new:
                    break
                answer.append(token)
            found.append(self._text(answer))
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids).strip()

    def arms(self) -> dict[str, Callable[[], list[str]]]:
        """What is measured, by name."""
        sizes = self._best_sizes()
        made: dict[str, Callable[[], list[str]]] = {
            "transformers": lambda: self.transformers(sizes["transformers"]),
            "transformers_merged": lambda: self._merged(lambda: self.transformers(sizes["transformers_merged"])),
            "luthier_attached": lambda: self.luthier(least=2**62),
            "luthier": self.luthier,
            "luthier_unshared": self._unshared,
        }
        if len({turns[-1]["content"] for turns in self.train}) <= CLOSED:
            made["luthier_choices"] = self.choices
        with contextlib.suppress(ImportError):
            if self.asked.gguf:
                from llama_cpp import Llama

                self.llama = Llama(self.asked.gguf, n_ctx=4096, n_threads=self.asked.threads, verbose=False)
                made["llama_cpp"] = self.llama_cpp
        return {name: arm for name, arm in made.items() if name in self.asked.arms or not self.asked.arms}

    def _unshared(self) -> list[str]:
        from luthier.model import stems

        usual, stems.WORTH_TOKENS = stems.WORTH_TOKENS, 2**62
        try:
            return self.luthier(guess=False)
        finally:
            stems.WORTH_TOKENS = usual

    def _merged(self, run: Callable[[], list[str]]) -> list[str]:
        """Time an arm of transformers on merged weights; merging itself is not counted against it."""
        from luthier.adapt.folded import folded

        with folded(self.model, self.prompts, self.new, least=0) as folding:
            assert folding.folded, folding.why
            self.paused = time.perf_counter()
            return run()

    def _best_sizes(self) -> dict[str, int]:
        """The batch size of those asked for that answers a few rows fastest, for both arms of transformers."""
        sizes = [size for size in self.asked.batches if size <= len(self.prompts)] or [len(self.prompts)]
        self.batch_seconds: dict[str, dict[int, float]] = {"transformers": {}, "transformers_merged": {}}
        few = [self.prompts[place % len(self.prompts)] for place in range(max(TRIED, max(sizes)))]
        if len(sizes) > 1:
            for name, found in self.batch_seconds.items():
                for size in sizes:
                    began = self.paused = time.perf_counter()
                    arm = lambda size=size: self.transformers(size, few)  # noqa: E731
                    self._merged(arm) if name.endswith("merged") else arm()
                    found[size] = time.perf_counter() - max(began, self.paused)
        return {name: min(found, key=found.__getitem__, default=sizes[0]) for name, found in self.batch_seconds.items()}


def measure(bench: Bench) -> dict[str, Any]:
    """Seconds of every arm by round, and its answers."""
    arms, seconds, texts = bench.arms(), {}, {}
    for turn in range(bench.asked.rounds):
        for name in list(arms) if turn % 2 == 0 else list(reversed(arms)):
            began = bench.paused = time.perf_counter()
            texts[name] = arms[name]()
            seconds.setdefault(name, []).append(time.perf_counter() - max(began, bench.paused))
            print(f"round {turn + 1}: {name} {seconds[name][-1]:.2f} s", flush=True)
    return {"seconds": seconds, "answers": texts}


def told(bench: Bench, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept: machine, versions, settings, seconds, ratios with their range, and how often texts are equal."""
    import torch
    import transformers

    from luthier.model import stems

    seconds, texts = found["seconds"], found["answers"]
    own = seconds.get("luthier", [])
    ratios = {name: [a / b for a, b in zip(each, own, strict=True)] for name, each in seconds.items() if own}
    plan = stems.find(bench.prompts)
    tokens = sum(map(len, bench.prompts))
    saved = tokens - sum(
        len(p) - (plan.stems[leaf].end if leaf >= 0 else 0) for p, leaf in zip(bench.prompts, plan.leaf, strict=True)
    )
    return {
        "data": bench.asked.data, "model": bench.asked.model, "dtype": bench.asked.dtype, "rows": len(bench.prompts),
        "max_new_tokens": bench.new, "prompt_tokens": tokens,
        "computed_prompt_tokens": tokens - saved + sum(stem.end - stem.begin for stem in plan.stems),
        "answer_tokens": sum(len(bench.tokenizer.encode(text)) for text in texts.get("luthier", ())),
        "adapter": bench.asked.run or f"lora of rank {RANK} after {bench.asked.tune} steps",
        "batch_sizes": bench.batch_seconds, "together": bench.asked.together,
        "machine": {
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
            "instructions": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "date": date.today().isoformat(), "seconds": seconds,
        "rows_per_second": {name: len(bench.prompts) / statistics.median(each) for name, each in seconds.items()},
        "times_luthier": {
            name: {"median": statistics.median(each), "range": [min(each), max(each)]} for name, each in ratios.items()
        },
        "same_text_as_luthier": {
            name: statistics.mean(a == b for a, b in zip(each, texts["luthier"], strict=True))
            for name, each in texts.items() if own
        },
        "right": {
            name: statistics.mean(a == b.strip() for a, b in zip(each, bench.golds, strict=True))
            for name, each in texts.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="demo")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--template", default="chat")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new", type=int, help="tokens of an answer at most; else from the lengths of the wanted ones")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--together", type=int, default=32, help="luthier's batch size")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[8, 16, 32], help="transformers' best of these is taken"
    )
    parser.add_argument("--tune", type=int, default=0, help="steps of LoRA before anything is measured")
    parser.add_argument("--run", help="the folder of a finished run of LoRA whose adapter is used")
    parser.add_argument("--gguf", help="the merged model for llama.cpp")
    parser.add_argument("--arms", nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()

    import torch

    torch.set_num_threads(asked.threads)
    bench = Bench(asked)
    kept = told(bench, measure(bench))
    print(json.dumps({key: kept[key] for key in ("times_luthier", "same_text_as_luthier", "right")}, indent=2))
    if asked.out:
        known = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else {}
        asked.out.write_text(json.dumps(known | {asked.data: kept}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
