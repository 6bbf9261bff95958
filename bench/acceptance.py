"""The command itself on a GPU, over recipes and architectures: what it promises, what it says, what an outsider sees.

    python bench/acceptance.py DOCUMENTS.jsonl OUT.json [--cases 3b-mission,8b-nf4-6g] [--scratch FOLDER] [--host]

Each case is one `drawplate tune` in a process of its own, on random weights of a real shape that are written to disk
as a checkpoint, with a tokenizer that is trained on the documents. Read off `record.json`: predicted and measured
bytes of both memories, planned and measured seconds, speeds, warnings. Measured from outside, every 50 ms: the bytes
that the driver counts for the process, and the kernel's counts of it. The exit code and the whole screen are kept
beside OUT.json, in OUT.screens/. A case that ends in a traceback or beyond the bounds is marked.

Models are written, used and removed group by group, so that few of them and their cache lie on the disk at a time.
`--host` asks before the cases how the kernel counts page-locked memory. Left out: the quality of what is learnt
(random weights), other programs on the card, several GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import about  # noqa: E402
from bench.shapes import SHAPES  # noqa: E402

SAMPLE_SECONDS, TIMELINE_SECONDS = 0.05, 0.5
DEVICE_BOUND, DEVICE_UNDER, HOST_BOUND, SECONDS_BOUND = 3.0, 1.0, 8.0, 10.0
"""Per cent: device memory either way and below what was needed, host memory, seconds of a step."""

MODELS: dict[str, dict[str, Any]] = {
    name: {"model_type": "llama", **SHAPES[name]} for name in ("135m", "1b", "3b", "8b")
}
MODELS |= {
    "qwen3-4b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
    "phi3-mini": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    },
    "gemma2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}

MISSION = (
    "data.packing=false",
    "data.pad_to_multiple_of=16",
    "quantization.load_in_4bit=true",
    "quantization.bnb_4bit_compute_dtype=float16",
    "lora.r=8",
    "lora.lora_alpha=32",
    "lora.target_modules=[q_proj,v_proj]",
    "lora.lora_dropout=0.1",
    "train.per_device_train_batch_size=7",
    "train.gradient_accumulation_steps=16",
    "train.fp16=true",
    "train.gradient_checkpointing=true",
)
NF4, EIGHT = ("quantization.precision=nf4",), ("train.effective_batch_size=8",)
GROUPS = (("135m", "1b", "3b"), ("qwen3-4b", "phi3-mini", "gemma2-2b"), ("8b",))
"""Models that lie on the disk at a time."""
STACKS_SECONDS = 90.0
"""How often a case that takes long writes to its screen where it is."""
COMMAND = (
    "import faulthandler, signal, sys; faulthandler.register(signal.SIGUSR1, all_threads=True); "
    "from drawplate.cli import main; main()"
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "135m-nothing-set": ("135m", ()),
    "135m-fp32": ("135m", ("quantization.precision=fp32",)),
    "1b-bf16": ("1b", ("quantization.precision=bf16",)),
    "1b-nf4-3g": ("1b", (*NF4, "memory.vram=3GiB", *EIGHT)),
    "3b-mission": ("3b", MISSION),
    "3b-nf4-5g": ("3b", (*NF4, "memory.vram=5GiB")),
    "3b-int8-7g": ("3b", ("quantization.precision=int8", "memory.vram=7GiB")),
    "3b-bf16-12g": ("3b", ("quantization.precision=bf16", "memory.vram=12GiB")),
    "qwen3-4b-10g": ("qwen3-4b", ("memory.vram=10GiB",)),
    "qwen3-4b-nf4": ("qwen3-4b", NF4),
    "phi3-mini-nf4-4g": ("phi3-mini", (*NF4, "memory.vram=4GiB")),
    "gemma2-2b-nf4-8g": ("gemma2-2b", (*NF4, "memory.vram=8GiB")),
    "8b-nf4-6g": ("8b", (*NF4, "memory.vram=6GiB")),
    "8b-bf16-8g": ("8b", ("quantization.precision=bf16", "memory.vram=8GiB")),
    "8b-fp8-20g": ("8b", ("quantization.precision=fp8", "memory.vram=20GiB")),
}


def main() -> None:
    """All cases, model by model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/acceptance"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--side-by-side", type=int, default=1, help="cases at a time")
    parser.add_argument("--one-group", action="store_true", help="all models on the disk at a time")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which a case is ended")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--host", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = {**about(), "bounds_percent": [DEVICE_BOUND, DEVICE_UNDER, HOST_BOUND, SECONDS_BOUND]}
    if given.host:
        found["page_locked"] = json.loads(subprocess.check_output([sys.executable, "-c", PAGE_LOCKED]))
        print(json.dumps(found["page_locked"], indent=1), flush=True)
    found["cases"] = {}
    wanted = given.cases.split(",")
    given.scratch.mkdir(parents=True, exist_ok=True)
    write_tokenizer(given.documents, given.scratch / "tokenizer")
    for group in [tuple(MODELS)] if given.one_group else GROUPS:
        cases = [case for case in wanted if CASES[case][0] in group]
        for model in dict.fromkeys(CASES[case][0] for case in cases):
            began = time.monotonic()
            write_model(model, given.scratch / model, given.scratch / "tokenizer")
            print(f"{model} written in {time.monotonic() - began:.0f} s", flush=True)
        with ThreadPoolExecutor(max_workers=given.side_by_side) as pool:
            running = {pool.submit(run_case, case, given): case for case in cases}
            for done in as_completed(running):
                case, facts = running[done], done.result()
                found["cases"][case] = facts
                given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(line_of(case, facts), flush=True)
        for model in group:
            shutil.rmtree(given.scratch / model, ignore_errors=True)
        shutil.rmtree(given.scratch / "cache" / "arenas", ignore_errors=True)


def write_tokenizer(documents: Path, folder: Path) -> None:
    """A byte-level BPE of 8,000 tokens, trained on the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines()]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_model(name: str, folder: Path, tokenizer: Path) -> None:
    """Random bf16 weights of the shape as a checkpoint of some shards; norms scale by one."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = dict(MODELS[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    config.architectures, config.dtype = [type(skeleton).__name__], torch.bfloat16
    config.save_pretrained(folder)
    tied = "lm_head.weight" if config.tie_word_embeddings else ""
    shards: dict[str, dict[str, Any]] = {}
    for tensor_name, parameter in skeleton.state_dict().items():
        if tensor_name != tied:
            parts = tensor_name.split(".")
            shard = f"layers-{int(parts[2]) // 8}" if parts[1] == "layers" else "ends"
            shards.setdefault(f"model-{shard}.safetensors", {})[tensor_name] = parameter.shape
    for file, shapes in shards.items():
        tensors = {}
        for tensor_name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
            scale = 0 if name.startswith("gemma") else 1  # a Gemma's norms multiply by one more than their weight
            tensors[tensor_name] = (tensor.normal_(0, 0.02) if len(shape) > 1 else tensor.fill_(scale)).cpu()
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, shapes in shards.items() for n in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    torch.cuda.empty_cache()


class Outside:
    """What can be seen of a process without asking it: the card's bytes in use, and the kernel's counts."""

    def __init__(self, process: int) -> None:
        import pynvml

        pynvml.nvmlInit()
        self.handle, self.nvml = pynvml.nvmlDeviceGetHandleByIndex(0), pynvml
        self.process, self.peaks = process, {}
        self.timeline, self.began = [], time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, int]:
        """The highest of each count."""
        self._stop.set()
        self._thread.join()
        return self.peaks

    def _of_process(self) -> int:
        running = self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle)
        return next((int(p.usedGpuMemory or 0) for p in running if p.pid == self.process), 0)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            counts = {"device": self._of_process()}
            try:
                lines = Path(f"/proc/{self.process}/status").read_text().splitlines()
            except OSError:
                lines = []
            wanted = ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmLck", "VmPin", "VmSwap")
            kernel = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.split(":")[0] in wanted}
            if "RssAnon" in kernel:
                counts["anon_and_shared"] = kernel["RssAnon"] + kernel["RssShmem"]
            counts |= kernel
            for key, value in counts.items():
                self.peaks[key] = max(self.peaks.get(key, 0), value)
            if not self.timeline or time.monotonic() - self.began - self.timeline[-1][0] > TIMELINE_SECONDS:
                row = [counts.get(key, 0) >> 20 for key in ("device", "RssAnon", "RssShmem", "RssFile")]
                self.timeline.append([round(time.monotonic() - self.began, 1), *row])


def run_case(case: str, given: argparse.Namespace) -> dict[str, Any]:
    """One `drawplate tune`; what its record says, and what was seen from outside."""
    model, settings = CASES[case]
    folder = given.scratch / f"run-{case}"
    shutil.rmtree(folder, ignore_errors=True)
    sets = [
        f"model.name_or_path={given.scratch / model}",
        f"data.files={given.documents.resolve()}",
        f"output_dir={folder}",
        f"train.max_steps={given.steps}",
        *settings,
        *given.set,
    ]
    recipe = given.scratch / "empty.yaml"
    recipe.write_text("data: {heldout_fraction: 0.1}\n", encoding="utf-8")
    command = [sys.executable, "-c", COMMAND, "tune", str(recipe)]
    command += [part for value in sets for part in ("--set", value)]
    environment = {**os.environ, "DRAWPLATE_CACHE": str(given.scratch / "cache"), "COLUMNS": "160"}
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
    )
    outside = Outside(process.pid)
    screen = screen_of(process, given.seconds)
    found: dict[str, Any] = {
        "set": list(settings),
        "exit_code": process.returncode,
        "wall_seconds": round(time.monotonic() - began, 1),
        "traceback": "Traceback" in screen or "unexpectedly" in screen,
        "outside": outside.end(),
    }
    found["timeline_mib"] = outside.timeline
    screens = given.out.with_suffix(".screens")
    screens.mkdir(exist_ok=True)
    (screens / f"{case}.txt").write_text(screen, encoding="utf-8")
    if (folder / "record.json").is_file():
        found |= facts_of(json.loads((folder / "record.json").read_text(encoding="utf-8")))
        found["outside_bounds"] = beyond(found)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def screen_of(process: subprocess.Popen[str], seconds: float) -> str:
    """All that the process writes until it ends, with its threads' stacks from time to time; ended after `seconds`."""
    began = time.monotonic()
    while True:
        try:
            return process.communicate(timeout=STACKS_SECONDS)[0]
        except subprocess.TimeoutExpired:
            if time.monotonic() - began < seconds:
                process.send_signal(signal.SIGUSR1)
                continue
            process.terminate()
        try:
            return process.communicate(timeout=STACKS_SECONDS)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0]


def facts_of(record: dict[str, Any]) -> dict[str, Any]:
    """What is judged of a record."""
    memory, times, planned = record["memory"], record["times"], (record["plan"] or {}).get("times") or {}
    plan = record["plan"]
    return {
        "status": record["status"],
        "memory": memory,
        "step_seconds": times["step_seconds"],
        "planned_step_seconds": planned.get("step_seconds", 0.0),
        "times": times,
        "training": {k: record["training"][k] for k in ("optimizer_steps", "tokens", "seconds", "tokens_per_second")},
        "phase_seconds": record["phase_seconds"],
        "rehearsal": record["rehearsal"],
        "self_check_difference": record["model"]["self_check_difference"],
        "warnings": record["warnings"],
        "plan": {
            key: plan[key]
            for key in ("precision", "micro_batch_tokens", "packing", "device_layers", "host_layers", "kept_layers")
            if key in plan
        },
        "host_lines": [line for line in plan["ledger"] if line["where"] == "host"],
        "device_lines": [line for line in plan["ledger"] if line["where"] == "device"],
    }


def beyond(found: dict[str, Any]) -> list[str]:
    """What is out of bounds: `device`, `host`, `seconds` (plan against record), `meter` (record against outsider)."""
    memory, out = found["memory"], []
    device, host = memory["device_peak_bytes"], memory["host_peak_bytes"]
    off = off_percent(memory["device_peak_predicted_bytes"], device)
    out += ["device"] if not -DEVICE_UNDER <= off <= DEVICE_BOUND else []
    out += ["host"] if abs(off_percent(memory["host_peak_predicted_bytes"], host)) > HOST_BOUND else []
    out += ["meter"] if abs(off_percent(found["outside"].get("device", 0), device)) > 1.5 else []
    steps = off_percent(found["planned_step_seconds"], found["step_seconds"])
    return out + (["seconds"] if abs(steps) > SECONDS_BOUND else [])


def off_percent(predicted: float, measured: float) -> float:
    """By how much a prediction is too high."""
    return 100 * (predicted / measured - 1) if measured else 0.0


def line_of(case: str, found: dict[str, Any]) -> str:
    """One case, as the table has it."""
    line = f"{case:18} exit {found['exit_code']} {found['wall_seconds']:6.1f} s"
    if "memory" not in found:
        return line + (" TRACEBACK" if found["traceback"] else "") + " no record"
    gib, memory, outside = 2**30, found["memory"], found["outside"]
    device = (memory["device_peak_predicted_bytes"], memory["device_peak_bytes"], outside.get("device", 0))
    host = (
        memory["host_peak_predicted_bytes"],
        memory["host_peak_bytes"],
        outside.get("anon_and_shared", 0),
        outside.get("RssFile", 0),
    )
    line += (
        " device " + "/".join(f"{b / gib:.2f}" for b in device) + " host " + "/".join(f"{b / gib:.2f}" for b in host)
    )
    line += f" step {found['planned_step_seconds']:.2f}/{found['step_seconds']:.2f}"
    return line + f" {' '.join(found['outside_bounds'])}" + (" TRACEBACK" if found["traceback"] else "")


PAGE_LOCKED = """
import json, mmap, tempfile, torch
def counts():
    lines = open("/proc/self/status").read().splitlines()
    wanted = ("VmRSS", "RssAnon", "RssFile", "RssShmem", "VmLck", "VmPin")
    return {l.split(":")[0]: int(l.split()[1]) // 1024 for l in lines if l.split(":")[0] in wanted}
torch.zeros(1, device="cuda")
found, before = {}, counts()
def note(name):
    global before
    now = counts()
    found[name] = {k: now[k] - before[k] for k in now if now[k] != before[k]}
    before = now
a = torch.empty(2**29, dtype=torch.uint8, pin_memory=True); note("torch pinned 512 MiB, untouched")
a.fill_(1); note("torch pinned, written")
m = mmap.mmap(-1, 2**29, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
t = torch.frombuffer(m, dtype=torch.uint8); t.fill_(1); note("anonymous 512 MiB")
torch.cuda.cudart().cudaHostRegister(t.data_ptr(), 2**29, 0); note("anonymous, page-locked")
f = tempfile.TemporaryFile(); f.write(bytes(2**29)); f.flush(); note("file of 512 MiB written")
g = mmap.mmap(f.fileno(), 2**29, prot=mmap.PROT_READ)
u = torch.frombuffer(g, dtype=torch.uint8)
found["status"] = int(torch.cuda.cudart().cudaHostRegister(u.data_ptr(), 2**29, 8)); note("file, page-locked read-only")
found["sum"] = int(u.sum()); note("file, read")
stats = torch.cuda.host_memory_stats().items()
found["torch host stats"] = {k: v for k, v in stats if "bytes.current" in k or "bytes.peak" in k}
print(json.dumps(found))
"""


if __name__ == "__main__":
    main()
