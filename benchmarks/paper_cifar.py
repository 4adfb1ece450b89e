"""SplitCIFAR10: five pairs of classes on a small conv network, in all four scenarios.

GG and GNs share their masks (labels 0 and 1 in every task), GNu has masks of its own (labels 0 to 9), NNs is a stream
whose tasks nobody tells, each of which comes twice. Last, what training on foreign copies costs and gives.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mnist_tasks import Images
from paper_engine import Engine, Setup, Tested, accuracy_given, ask, begin_task, found, in_processes
from paper_report import measure, new_figure, save_figure
from paper_stream import GROUP_ROWS, Feeder, TrueTask, iter_pieces, judge
from PIL import Image
from rich.progress import track

from supsupd.choices import Method, Objective
from supsupd.learning.features import ClassSums, FeatureModel
from supsupd.learning.inference import Scorer
from supsupd.learning.records import TaskRecord
from supsupd.learning.rules import pick_learner
from supsupd.sections import ImageTransforms, LearningSettings, NetworkSettings, RecognitionSettings

Scenario = Literal["GNs", "GNu", "NNs"]
Foreign = Literal["none", "rotated", "shuffled"]
Sums = tuple[Mapping[int, Mapping[int, ClassSums]], np.ndarray | None]
TASKS = 5
LEAST_GIVEN, LEAST_GROUP, LEAST_SINGLE = 92.0, 97.0, 60.0
BATCH_ROWS = 128
QUERIES = {"single": 1, "group": GROUP_ROWS}
"""Images of a query."""
FOREIGN: tuple[Foreign, ...] = ("none", "rotated", "shuffled")
EXACT: tuple[Objective, ...] = ("features", "entropy", "g", "energy", "max-logit")
ONE_STEP: tuple[Method, ...] = ("one-shot", "binary")
ONE_STEP_ROWS = {1: 100, GROUP_ROWS: 640}
"""Test images of each task that one-shot and binary are asked about, by the images of a query: a gradient for each."""


@dataclass(frozen=True)
class Sizes:
    """Steps of a task's one batch with labels shared and not, of a batch of the stream, and with foreign copies; and
    images of each task: to train on, to ask with the task given, and inferred."""

    shared: int = 2000
    unshared: int = 750
    stream: int = 10
    foreign: int = 400
    train: int = 10_000
    test: int = 2000
    asked: int = 640


FULL = Sizes(shared=6000, unshared=6000, stream=40, foreign=2000, asked=2000)


def setup(scenario: Scenario, steps: int, seed: int, foreign: Foreign = "none") -> Setup:
    """Four convolutions and a hidden layer of 256; one batch begins a task, but for NNs."""
    network = NetworkSettings(
        kind="conv",
        channels=[32, 0, 64, 0, 128, 0, 128],
        hidden=[256],
        norm="group",
        outputs=100,
        normalisation="none",
        seed=seed,
        transforms=ImageTransforms(
            mean=[0.4914, 0.4822, 0.4465], sd=[0.2470, 0.2435, 0.2616], horizontal_flip=True, crop=4
        ),
    )
    learning = LearningSettings(lr=1e-3, minibatch=64, steps=steps, max_steps=steps, foreign=foreign, seed=seed)
    if scenario != "NNs":
        # The average looks back over a hundredth of the steps and a half.
        one_batch = {"schedule": "cosine", "averaging": max(0.5, 1 - 15 / steps), "held_out": 0.05}
        learning = learning.model_copy(update=one_batch)
    return Setup(network, learning, RecognitionSettings(scenario=scenario, features=True))


def run(data: Path, full: bool, seed: int) -> dict[str, Any]:
    """Everything that trains, then everything that asks."""
    return Experiment(data, FULL if full else Sizes(), seed).measured()


@dataclass(frozen=True)
class Experiment:
    """The experiment at any size."""

    data: Path
    sizes: Sizes
    seed: int

    def measured(self) -> dict[str, Any]:
        jobs: dict[str, Callable[[], Any]] = {"stream": self.stream}
        jobs |= {f"GNs {task}": partial(self.train, "GNs", task) for task in range(TASKS)}
        jobs |= {f"foreign {kind}": partial(self.compare_foreign, kind) for kind in FOREIGN}
        jobs |= {f"GNu {task}": partial(self.train, "GNu", task) for task in range(TASKS)}
        jobs["features"] = self.feature_sums
        done = _all_done(jobs, "training")
        shared, unshared = (
            Trained(self, scenario, [done[f"{scenario} {task}"] for task in range(TASKS)], done["features"])
            for scenario in ("GNs", "GNu")
        )
        ways: list[tuple[Method, Objective]] = [("exact", objective) for objective in EXACT]
        ways += [(method, objective) for method in ONE_STEP for objective in EXACT if objective != "features"]
        jobs = {"GG": shared.given, "GNu given": unshared.given}
        jobs |= {f"GNs {m} {o}": partial(shared.inferred, m, o) for m, o in ways}
        jobs |= {f"GNu {m} {o}": partial(unshared.inferred, m, o) for m, o in ways[:2]}
        asked = _all_done(jobs, "asking")
        outcomes = {"given": {"GG": asked.pop("GG"), "GNu": asked.pop("GNu given")}, "inferred": asked}
        outcomes |= {"stream": done["stream"], "foreign": {kind: done[f"foreign {kind}"] for kind in FOREIGN}}
        settings = {s: setup(s, self.steps(s), self.seed).to_json() for s in ("GNs", "GNu", "NNs")}
        return {"settings": settings | {"sizes": asdict(self.sizes)}, "measures": _measures(outcomes), **outcomes}

    def steps(self, scenario: Scenario) -> int:
        return {"GNs": self.sizes.shared, "GNu": self.sizes.unshared, "NNs": self.sizes.stream}[scenario]

    def engine(self, scenario: Scenario, steps: int, foreign: Foreign = "none") -> Engine:
        images = cifar(self.data, "train")
        return found(setup(scenario, steps, self.seed, foreign), images.x[:1000], _labels(scenario, images.y[:1000]))

    def train(self, scenario: Scenario, task: int) -> TaskRecord:
        """The mask of one pair of classes."""
        return self._begun(self.engine(scenario, self.steps(scenario)), scenario, task)

    def _begun(self, engine: Engine, scenario: Scenario, task: int) -> TaskRecord:
        images = _pair(cifar(self.data, "train"), task, self.sizes.train)
        samples = engine.samples(images.x, _labels(scenario, images.y))
        return begin_task(engine, samples, task + 1, f"{self.seed} {task}")

    def tests(self, scenario: Scenario, rows: int) -> list[Tested]:
        """So many test images of each task."""
        pairs = [_pair(cifar(self.data, "test"), task, rows) for task in range(TASKS)]
        return [Tested(task + 1, pair.x, _labels(scenario, pair.y)) for task, pair in enumerate(pairs)]

    def feature_sums(self) -> Sums:
        """What recognition.features keeps of all tasks' training images: the network is the same in all scenarios."""
        engine = self.engine("GNu", self.steps("GNu"))
        model = FeatureModel(engine.network, engine.normaliser.transforms)
        for task in range(TASKS):
            images = _pair(cifar(self.data, "train"), task, self.sizes.train)
            samples = engine.samples(images.x, images.y)
            model = model.learned(task + 1, samples.x, samples.y)
        return model.tasks, model.products

    def compare_foreign(self, kind: Foreign) -> dict[str, float]:
        """Two tasks, one with each of the first two pairs of classes."""
        engine = self.engine("GNs", self.sizes.foreign, kind)
        started = time.process_time()
        tasks = [self._begun(engine, "GNs", task) for task in range(2)]
        seconds = time.process_time() - started
        predictor, tests = engine.predictor(tasks), self.tests("GNs", self.sizes.test)[:2]
        result = {"cpu_seconds_per_task": seconds / 2, "given": float(np.mean(accuracy_given(predictor, tests)))}
        for objective in ("entropy", "energy"):
            result[objective] = ask(predictor, tests, 1, "exact", objective).task
        return {name: round(value, 5) for name, value in result.items()}

    def stream(self) -> dict[str, Any]:
        """NNs: every image once, the first half of each task and then the second, boundaries anywhere."""
        engine = self.engine("NNs", self.sizes.stream)
        rules, transforms = engine.setup.recognition, engine.normaliser.transforms
        scorer = Scorer(engine.network, engine.setup.learning.threads)
        learner = pick_learner(rules)(engine.network, scorer, engine.setup.learning, rules, transforms)
        feeder, visits = Feeder(engine, learner), self._visits(engine)
        total = sum(len(visit.y) for visit in visits) // BATCH_ROWS
        for piece in track(iter_pieces(visits, BATCH_ROWS, aligned=False), "stream", total=total):
            feeder.feed(replace(piece, truth=piece.truth % TASKS))
        if not feeder.found:
            return {"batches": total, "masks": 0, "undecided": total}
        return judge(feeder, visits[:TASKS]).to_json() | self._by_features(feeder, visits)

    def _visits(self, engine: Engine) -> list[TrueTask]:
        half = self.sizes.train // 2
        train = [_pair(cifar(self.data, "train"), task, 2 * half) for task in range(TASKS)]
        tests = self.tests("NNs", self.sizes.asked)
        return [
            TrueTask(train[task].x[part], train[task].y[part] % 2, tests[task].x, tests[task].y, engine.normaliser)
            for part in (slice(0, half), slice(half, None))
            for task in range(TASKS)
        ]

    def _by_features(self, feeder: Feeder, visits: list[TrueTask]) -> dict[str, float]:
        """The same masks asked by the features of the batches that each got, as the stream said."""
        engine, owners = feeder.engine, feeder.owners()
        model = FeatureModel(engine.network, engine.normaliser.transforms)
        for number, piece in enumerate(iter_pieces(visits, BATCH_ROWS, aligned=False), start=1):
            if number in feeder.found:
                samples = engine.prepared(piece.x, piece.y)
                model = model.learned(feeder.found[number], samples.x, samples.y)
        sizes = {mask: sum(its == mask for its in feeder.found.values()) for mask in owners}
        own = {owners[mask]: mask for mask in sorted(owners, key=lambda mask: sizes[mask])}
        tests = [Tested(own.get(t, 0), visit.test_x, visit.test_y) for t, visit in enumerate(visits[:TASKS])]
        predictor = engine.predictor(list(feeder.learner.tasks.values()), model)
        shares = {name: ask(predictor, tests, rows, "exact", "features") for name, rows in QUERIES.items()}
        tasks = {f"features_task_{name}": round(right.task, 5) for name, right in shares.items()}
        return tasks | {f"features_{name}": round(right.both, 5) for name, right in shares.items()}


@dataclass(frozen=True)
class Trained:
    """The masks of a scenario, ready to be asked."""

    experiment: Experiment
    scenario: Scenario
    tasks: Sequence[TaskRecord]
    sums: Sums

    def _engine(self) -> Engine:
        return self.experiment.engine(self.scenario, self.experiment.steps(self.scenario))

    def given(self) -> list[float]:
        """Accuracy of each task under its own mask."""
        tests = self.experiment.tests(self.scenario, self.experiment.sizes.test)
        return [round(share, 5) for share in accuracy_given(self._engine().predictor(self.tasks), tests)]

    def inferred(self, method: Method, objective: Objective) -> dict[str, dict[str, float]]:
        """Shares right from one image and from a group."""
        engine, asked = self._engine(), self.experiment.sizes.asked
        model = FeatureModel(engine.network, engine.normaliser.transforms, *self.sums)
        predictor = replace(engine.predictor(self.tasks, model), method=method, objective=objective)
        result = {}
        for name, rows in QUERIES.items():
            count = min(asked, ONE_STEP_ROWS[rows]) if method in ONE_STEP else asked
            tests = self.experiment.tests(self.scenario, count)
            result[name] = ask(predictor, tests, rows, method, objective).to_json() | {"images": TASKS * count}
        return result


def _all_done(jobs: Mapping[str, Callable[[], Any]], what: str) -> dict[str, Any]:
    results = in_processes(partial(_do, list(jobs.values())), len(jobs), what)
    return dict(zip(jobs, results, strict=True))


def _do(jobs: list[Callable[[], Any]], index: int) -> Any:
    return jobs[index]()


@cache
def cifar(data: Path, part: str) -> Images:
    """CIFAR-10's images of `part`, train or test, uint8 (n, 32, 32, 3), in one fixed random order."""
    with np.load(data / "cifar10_jpeg.npz", allow_pickle=False) as file:
        jpeg, offsets, y = (file[f"{part}_{name}"] for name in ("jpeg", "offset", "y"))
    ends = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    x = np.stack([np.asarray(Image.open(io.BytesIO(jpeg[start:stop].tobytes()))) for start, stop in ends])
    return Images(x, y.astype(np.int64)).shuffled(np.random.default_rng(0))


def _pair(images: Images, task: int, rows: int) -> Images:
    mine = np.flatnonzero(images.y // 2 == task)[:rows]
    return Images(images.x[mine], images.y[mine])


def _labels(scenario: Scenario, y: np.ndarray) -> np.ndarray:
    return y if scenario == "GNu" else y % 2


def _measures(outcomes: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = {scenario: 100 * float(np.mean(shares)) for scenario, shares in outcomes["given"].items()}
    rows = [
        measure("GG: accuracy", given["GG"], LEAST_GIVEN),
        measure("GG: accuracy of the worst task", 100 * min(outcomes["given"]["GG"])),
        measure("labels 0 to 9, task given: accuracy", given["GNu"]),
    ]
    least = {"single": LEAST_SINGLE, "group": LEAST_GROUP}
    for way, shares in outcomes["inferred"].items():
        scenario, method, objective = way.split(maxsplit=2)
        for name, images in QUERIES.items():
            what = f"{scenario}, {images} image{'s' * (images > 1)}, {method} {objective}"
            target = least[name] if (scenario, objective) == ("GNs", "features") else None
            rows.append(measure(f"{what}: task right", 100 * shares[name]["task"], target))
            if objective == "features":
                rows.append(measure(f"{what}: accuracy", 100 * shares[name]["accuracy"]))
    return [*rows, *_stream_measures(outcomes["stream"]), *_foreign_measures(outcomes["foreign"])]


def _stream_measures(stream: Mapping[str, Any]) -> list[dict[str, Any]]:
    counts = [
        measure(f"NNs: masks for {TASKS} tasks", stream["masks"], TASKS, sense="="),
        measure(f"NNs: batches undecided of {stream['batches']}", stream["undecided"]),
    ]
    if not stream["masks"]:
        return counts
    return [
        *counts,
        measure("NNs: batches at their mask, %", 100 * stream["purity"]),
        measure("NNs: accuracy, mask given", 100 * stream["given"]),
        *(
            measure(f"NNs, {images} image{'s' * (images > 1)}, exact {way}: {what}", 100 * stream[f"{key}{name}"])
            for way, keys in {"entropy": ("task_", ""), "features": ("features_task_", "features_")}.items()
            for name, images in QUERIES.items()
            for what, key in zip(("task right", "accuracy"), keys, strict=True)
        ),
    ]


def _foreign_measures(foreign: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for kind, shares in foreign.items():
        what = f"foreign {kind}, 2 tasks"
        rows += [
            measure(f"{what}: accuracy, task given", 100 * shares["given"]),
            measure(f"{what}: task right from one image, entropy", 100 * shares["entropy"]),
            measure(f"{what}: task right from one image, energy", 100 * shares["energy"]),
            measure(f"{what}: CPU seconds a task", shares["cpu_seconds_per_task"]),
        ]
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Task right by way of inference, and accuracy of each task."""
    figure = new_figure()
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ways = [way for way in result["inferred"] if way.startswith("GNs exact")]
    for place, (name, least) in enumerate((("single", LEAST_SINGLE), ("group", LEAST_GROUP))):
        values = [100 * result["inferred"][way][name]["task"] for way in ways]
        label = f"{QUERIES[name]} image{'s' * place}"
        bars = left.bar(np.arange(len(ways)) + 0.4 * place - 0.2, values, 0.38, label=label)
        left.bar_label(bars, fmt="%.0f")
        left.axhline(least, color=f"C{place}", linestyle=":")
    left.set_xticks(range(len(ways)), [way.removeprefix("GNs exact ") for way in ways])
    left.set(ylim=(0, 110), title="GNs: task right, % (dotted: wanted)")
    left.legend(loc="lower left")
    for place, (name, values) in enumerate(result["given"].items()):
        right.bar(np.arange(TASKS) + 0.4 * place - 0.2, [100 * value for value in values], 0.38, label=name)
    right.axhline(LEAST_GIVEN, color="k", linestyle=":")
    right.set(ylim=(50, 100), xlabel="task", title="task given: accuracy, %")
    right.legend(loc="lower right")
    figure.suptitle("SplitCIFAR10, 5 pairs of classes, conv network")
    save_figure(figure, path)
