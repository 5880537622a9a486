"""Fine-tunes the model on chunks of long annotated videos.

    python train.py sft_tiny out=run                         a tiny model on a bundled clip, on a CPU, in less than a minute
    python train.py PRESET data.datasets.main.path=FILE      a preset of configs/, or the path of a file like them
    python train.py PRESET steps=100 step.optimizer.learning_rate=2e-5 mesh.tensor=4

Every setting is a field of `svlm_jax.training.config.RunConfig`; `a.b=c` changes one. What is in `out` already is gone on with.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax

from svlm_jax import storage
from svlm_jax.checkpoints.hub_config import read_config
from svlm_jax.checkpoints.load import find, load_params
from svlm_jax.checkpoints.run_form import described_in, is_run
from svlm_jax.checkpoints.save import write_json
from svlm_jax.cli import guarded
from svlm_jax.configs.models import MODELS
from svlm_jax.data.pipeline import make_batches
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.model.qwen_vl import init_params
from svlm_jax.planning.report import of_run
from svlm_jax.sharding import make_mesh, param_shardings, replicated_axes
from svlm_jax.tokenizer import Tokenizer
from svlm_jax.training import hosts, sinks
from svlm_jax.training.checkpoint import Checkpoints, describe
from svlm_jax.training.config import RunConfig, as_json, resolve
from svlm_jax.training.evaluation import Evaluator
from svlm_jax.training.goodput import process_start
from svlm_jax.training.loop import run
from svlm_jax.training.plots import plot
from svlm_jax.training.report import Report
from svlm_jax.training.setup import make_trainer
from svlm_jax.training.step import Trainer, TrainState
from svlm_jax.training.turns import silence


def train(config: RunConfig) -> TrainState:
    """The state after the last step."""
    # Hosts
    sinks.require(config.report)
    hosts.start(config.hosts)
    chief = jax.process_index() == 0
    print(hosts.table(), file=sys.stderr)

    # Model
    folder = find(config.weights)[0] if config.weights else None
    model = read_config(folder) if folder else MODELS[config.model]()
    words = described_in(folder) if folder else tiny_path()
    tokenizer = Tokenizer.load(words)

    # Mesh
    mesh = make_mesh(**config.mesh.sizes(jax.device_count()), devices=jax.devices())
    for line in replicated_axes(model, mesh):
        print(f"stays whole: {line}", file=sys.stderr)

    # Data
    shard = hosts.shard(mesh)
    batches = iter(make_batches(config.data, tokenizer, model.vision, shard=shard, workers=config.workers, go_on=shard[1] > 1))

    # Step
    trainer = make_trainer(config, model, mesh, jax.default_backend())
    for line in trainer.recipe.attention.rejected:
        print(f"attention {line}", file=sys.stderr)
    evaluator = Evaluator.of(trainer, config, tokenizer, shard)

    # State
    mirror = storage.Mirror(config.out, go_on=chief) if storage.is_remote(config.out) else None
    out = mirror.local if mirror else Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints.open(storage.join(config.out, "checkpoints"), config.checkpoint)
    step = checkpoints.latest
    if step is None:
        state = first_state(trainer, config, folder)
    else:
        state, place = checkpoints.restore(step, trainer.abstract_state())
        batches.set_state(place)
        print(f"goes on after step {step}", file=sys.stderr)
    if chief:
        (out / "config.json").write_text(as_json(config))
        describe(out, model, folder, words, config.step.dtype)
        if mirror:
            mirror.push()  # before the first checkpoint, which is read with it

    # Loop
    metrics, after = out / "metrics.jsonl", step or 0
    others = sinks.open_sinks(config, out, after) if chief else ()
    report = Report(metrics if chief else None, after=after, steps=config.steps, sinks=others, mirror=mirror, began=process_start())
    here = dataclasses.replace(config, out=str(out))
    try:

        def write_plan(program: jax.stages.Compiled) -> None:
            if chief:
                write_json(out / "plan.json", of_run(program, config, trainer))

        pause = silence(tokenizer)
        state, why = run(state, trainer, batches, checkpoints, report, here, pause=pause, evaluator=evaluator, compiled=write_plan)
        report.say(why)
        report.say(str(report.clock))
        if chief and plot(metrics, out / "plots.png"):
            report.say(f"plots: {out / 'plots.png'}")
    finally:
        report.close()
        batches.close()
        checkpoints.close()
        if mirror:
            mirror.close()
    return state


def first_state(trainer: Trainer, config: RunConfig, folder: storage.Place | None) -> TrainState:
    """The state before the first step: weights read from `folder` or drawn, straight onto their devices."""
    key = jax.random.key(config.seed)
    init = jax.jit(trainer.init, out_shardings=trainer.shardings(), donate_argnums=0 if folder else ())
    if folder is None:
        return jax.jit(lambda: trainer.init(init_params(trainer.model, key, stacked=True), key), out_shardings=trainer.shardings())()
    shardings = param_shardings(trainer.model, trainer.recipe.placement.mesh, stacked=True)
    dtype = "float32" if is_run(folder) else None  # what a run trained is not rounded when another goes on from it
    return init(load_params(folder, trainer.model, dtype=dtype, stacked=True, shardings=shardings), key)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="a preset of configs/, or a Python file with a function `config`")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")

    def work(args: argparse.Namespace) -> None:
        train(resolve(args.preset, args.overrides))

    return guarded(work, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
