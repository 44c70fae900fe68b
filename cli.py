"""How every script speaks with its user: flags with ranges, errors of one line, device, files.

What a user gets wrong is an InputError, raised where it is known and caught once, in `run`: one
line on stderr that says how to mend it, and exit status 2.
"""
import argparse
import contextlib
import io
import json
import os
import signal
import sys
import timeit
from datetime import timedelta
from pathlib import Path

import torch
from joblib import cpu_count as cores  # that this process may use; the machine may have more


class InputError(Exception):
    """A mistake of the user's; the message says what is wrong and how to mend it."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, high=float("inf")):
    """An argparse type: an int or a float from `low` to `high`."""
    def parse(text):
        value = kind(text)  # argparse itself reports text that is no number
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low}..{high}")
        return value
    parse.__name__ = kind.__name__  # argparse puts it into its message
    return parse


def run(main, parse_args):
    """Run a script. `main` takes the parsed flags."""
    try:
        main(parse_args())
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def print_table(title, scores, keys):
    """{name: {key: value}}: numbers to three decimals, a dash for None or nothing."""
    for name, values in {title: dict(zip(keys, keys)), **scores}.items():
        line = f"{name:<33}"
        for key in keys:
            value = values.get(key)
            if isinstance(value, tuple) and None not in value:  # an interval
                value = f"{value[0]:.3f}..{value[1]:.3f}"
            cell = f"{value:.3f}" if isinstance(value, float) else str(value).replace("None", "-")
            line += cell.rjust(max(len(key), 5) + 4)  # an interval has 12 characters
        print(line)


@contextlib.contextmanager
def atomic(path):
    """Gives a draft's path to write to; the draft takes the place of `path` once it is whole."""
    path = Path(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        os.replace(draft, path)
    except BrokenPipeError:  # of our output, not of this file
        raise
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); what was saved before is kept")
    finally:
        with contextlib.suppress(OSError):  # where there was no folder there is no draft
            draft.unlink()


def ignore_sigterm(_):
    """A loader's worker serves on when SIGTERM reaches the whole process group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def save_tensors(path, tensors):
    """torch.save by `atomic`. Through memory, as torch's writer hides a full disk."""
    file = io.BytesIO()
    torch.save(tensors, file)
    with atomic(path) as draft:
        draft.write_bytes(file.getbuffer())


def open_log(path, step):
    """out/log.jsonl without the lines that a killed run wrote after its last checkpoint."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
    with atomic(path) as draft:
        draft.write_text("".join(kept))
    return open(path, "a", buffering=1)


def pick_device(name=None):
    """torch.device of --device; where that was left out cuda if there is one, else cpu."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name} cannot be used here; leave it out, or start fewer "
                         "processes") from None
    return torch.device(name)


def join_processes(name=None):
    """-> (device, rank, number of processes); joins the other processes under torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and name != "cpu" and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # at once, so that nothing is put on GPU 0
    device, backend = pick_device(name), "gloo"
    if world > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo carries small flags, so that no GPU waits for them
    if world > 1:  # a day, because the others wait while the first process prepares a data set
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    torch.backends.cudnn.benchmark = True
    return device, rank, world


def pick_amp(choice, device):
    """-> (autocast dtype or None, why) for --amp auto|bf16|fp16|off.

    auto: on a GPU bf16 where the hardware has it, else fp16. On a CPU the faster one of bf16 and
    fp32: some processors gain a factor of two from bf16 and others lose, so it is measured.
    """
    if choice != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice), f"--amp {choice}"
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16 if has_it else torch.float16), f"the GPU has bf16: {has_it}"
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(512, 512, dtype=dtype)
        seconds.append(min(timeit.repeat(lambda: a @ a, number=1, repeat=6)))  # the first warms up
    share = seconds[0] / seconds[1]
    why = f"bf16: a matrix product takes {share:.2f} of its time in fp32"
    return (torch.bfloat16 if share < 0.8 else None), why
