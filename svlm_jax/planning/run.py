"""The command `svlm plan`."""

import argparse
import dataclasses
import shlex
from pathlib import Path

from svlm_jax.bench.report import write_json
from svlm_jax.commands import UsageError
from svlm_jax.config import StreamConfig
from svlm_jax.configs.models import MODELS
from svlm_jax.configs.recipes import TOPOLOGIES
from svlm_jax.planning import report, serving
from svlm_jax.planning.chips import parse_topology
from svlm_jax.planning.training import model_of, plan_training
from svlm_jax.training.config import MeshConfig, override, resolve


def parse_mesh(text: str) -> MeshConfig:
    """Of `fsdp=-1,tensor=4`; axes that are not named are 1."""
    return override(MeshConfig(fsdp=1), [part.strip() for part in text.split(",")])


def run(args: argparse.Namespace) -> int:
    """0 where it fits, 1 where it does not."""
    asked = args.topology or TOPOLOGIES.get(args.config)
    if asked is None:
        raise UsageError("--topology is missing: say for which chips, such as --topology v5e:16x16")
    topology = parse_topology(asked)
    mesh = parse_mesh(args.mesh) if args.mesh else None
    command = shlex.join(["svlm", "plan", args.config, *_flags(args), *args.overrides])
    if args.serve:
        if args.overrides and args.config in MODELS:
            raise UsageError(f"{args.overrides[0]}: settings are those of a preset, and {args.config} is a model")
        model = MODELS[args.config]() if args.config in MODELS else model_of(resolve(args.config, args.overrides))
        served = serving.plan_serving(
            model, topology, mesh or MeshConfig(fsdp=1, tensor=-1), streams=args.streams, config=StreamConfig(kv=args.kv)
        )
        print(serving.table(served))
        if args.json:
            write_json(Path(args.json), [serving.as_object(served, command)])
        return 0 if served.fits else 1
    if args.streams != 1:
        raise UsageError("--streams goes with --serve")
    if args.kv:
        raise UsageError("--kv goes with --serve")
    config = resolve(args.config, args.overrides)
    planned = plan_training(dataclasses.replace(config, mesh=mesh) if mesh else config, topology)
    print(report.table(planned, args.config))
    if args.json:
        write_json(Path(args.json), [report.as_object(planned, command)])
    return 0 if planned.fits else 1


def _flags(args: argparse.Namespace) -> list[str]:
    flags = [f"--{name}={getattr(args, name)}" for name in ("topology", "mesh") if getattr(args, name)]
    kv = [f"--kv={args.kv}"] if args.kv else []
    return flags + (["--serve", f"--streams={args.streams}", *kv] if args.serve else [])
