"""The fault matrix: what can go wrong, and what a person sees. The tests assert every word of it.

`<...>` stands for a name or a number. A row is held by the tests that are called `test_row_NN_...`.
"""

from __future__ import annotations

import re

FAULTS: dict[int, str] = {
    1: "SIGKILL at every write, fsync and rename of a checkpoint",
    2: "SIGKILL at random moments, in forward, backward and the optimizer's step",
    3: "SIGTERM; SIGTERM and then SIGKILL",
    4: "Ctrl-C once, twice",
    5: "SIGHUP; SIGSTOP and SIGCONT",
    6: "disk full in a checkpoint, in the log, in the report",
    7: "fsync returns an I/O error",
    8: "output directory read-only or not ours",
    9: "a checkpoint truncated, with a flipped bit, without manifest, of a newer schema",
    10: "all checkpoints bad",
    11: "a pickle planted in a checkpoint or model folder",
    12: "resume with another recipe, base model or data",
    13: "resume on another GPU or torch",
    14: "out of memory in forward or backward",
    15: "out of memory at one sequence",
    16: "out of memory only when resuming",
    17: "another process takes the GPU's memory",
    18: "NaN or Inf in the loss, or in gradients only",
    19: "a loss spike",
    20: "CUDA error, device lost",
    21: "a hang",
    22: "tracker or display dies",
    23: "the clock jumps",
    24: "two runs in one folder",
    25: "no network and the model not on this machine; a download that is cut; a data set that does not exist",
    26: "no GPU, an old driver",
    27: "a model configuration that asks for code",
    35: "secrets in documents and environment",
    70: "an adapter that computes more than plain LoRA, or belongs to a changed base",
    71: "a model whose files hold what its configuration does not read: surplus tensors, another program's codes",
    72: "an adapter on another base model than it was trained on",
    65: "an adapter whose tensors PEFT would not load",
    36: "empty folder, all duplicates, one document, near-duplicates",
    46: "Drawplate's own caches fill the disk; no room for the adapter",
    100: "after training, the base model as released cannot be measured with the adapter",
    47: "memory too small for the self-check",
    49: "a loss that is right with a gradient that is wrong",
    110: "a cache below something that is no folder",
    48: "libraries that warn, log, or write to standard error from C",
    80: "rows, files and keys that cannot be read whole or learnt as they are meant",
    81: "a chat template that closes no answer, a tokenizer without an end",
    82: "a prompt longer than a window",
    91: "an exception that is not ours, of Python, torch, its compiler or safetensors",
    92: "standard error closed, or standard streams that refuse; a compiler's cache that cannot be made",
    93: "one of several processes under torchrun, accelerate or MPI",
    94: "a hub that answers 429 or 500, forbids, or is the login page of a network",
    95: "resume from another folder; a change of the recipe that is accepted",
    90: "a recipe that cannot be meant: a key twice, an empty path, a pattern that is none, another library's keys",
}

SEES: dict[int, tuple[str, ...]] = {
    1: ("The checkpoint step-<n>.tmp-<pid> was never finished and is not used.", "The run goes on after step <n>."),
    2: ("The run goes on after step <n>.",),
    3: (
        "The run was stopped by SIGTERM after step <n>.",
        "Step <n> is saved, with the optimizer's state, in <folder>.",
        "drawplate resume <run>",
    ),
    4: (
        "The run was stopped by SIGINT after step <n>.",
        "The run was interrupted.",
        "The last good checkpoint is <folder>",
    ),
    5: (),
    6: (
        "could not be written: No space left on device. Training goes on and tries again. Step <n> is saved",
        "It is the third checkpoint in a row.",
        "Free some space, then: drawplate resume <run>",
        "metrics.jsonl could not be written (No space left on device) and misses lines; training goes on.",
    ),
    7: ("could not be written: Input/output error.", "Look after that disk."),
    8: ("The output folder <run> cannot be written.", "Nothing in it was touched."),
    9: (
        "A checkpoint is damaged: <file> has other bytes than were written (its sha256 differs). "
        "The one before it is used.",
        "has <n> bytes where <m> were written",
        "MANIFEST.json is missing.",
        "MANIFEST.json is damaged.",
        "has schema <n>, and this version of Drawplate reads schema 1.",
    ),
    10: (
        "No checkpoint can be trusted. <reasons>",
        "Nothing was changed or removed.",
        "Start over on request: drawplate tune <run>/recipe.yaml --set output_dir=ANOTHER_FOLDER",
    ),
    11: (
        "<file> is not in its manifest; it was not opened.",
        "has its weights only as pickles (<file>), which can run code when opened.",
    ),
    12: (
        "The run is not the one that was saved: train.learning_rate is <a> and was <b>.",
        "data: the training documents are others (sha256 <a> and was <b>)",
        "model: the base model's weights are others (sha256 <a> and was <b>)",
        "Undo the change, or accept it by name: drawplate resume <run> --accept <key>",
    ),
    13: ("it is no longer promised to be equal bit for bit.",),
    14: (
        "Out of memory in step <n>: it is done again with micro-batches of <n> tokens.",
        "its largest line is <line>",
    ),
    15: (
        "Out of memory in step <n>: it is done again with memory.activations: recompute.",
        "Out of memory in step <n>: it is done again with memory.activations: offload.",
        "Step <n> runs out of memory with a micro-batch of one sequence.",
    ),
    16: (),
    17: ("of the device are free: another process may hold the rest.",),
    18: (
        "The loss of step <n> is not a number. Documents in it: <documents>. The step is skipped.",
        "It is not the first: training goes back to step <n>.",
        "The step was not applied; the adapter is that of step <n>.",
    ),
    19: ("The loss of step <n> jumped to <loss>. Documents in it: <documents>.",),
    20: ("The device was lost (<error>).", "Step <n> is saved, with the optimizer's state, in <folder>."),
    21: ("Step <n> hangs: nothing came of it for <n> s. What every thread was doing is in <file>.",),
    22: (
        "<tracker> failed and gets no more records (<error>); training goes on.",
        "The display failed (<error>) and shows nothing more; training goes on.",
    ),
    23: (),
    24: ("is in use by another run (process <pid> on <host>).",),
    25: ("<model> is not on this machine and could not be fetched", "With a network run `hf download <model>`",
        "There is no public dataset <name> on the hub.", "The dataset <name> is gated"),
    26: ("model.device_map asks for cuda, but <cause>.", "<cure>; or set model.device_map to cpu."),
    27: ("asks to run code that comes with the model; Drawplate never does.",),
    35: (),
    70: (
        "asks for use_dora: true, <meaning>; Drawplate does not compute that",
        "started from init_lora_weights: pissa, which changes the base model's own weights",
    ),
    71: (
        "<model> holds <n> tensors that <class> with this config.json does not read, the first <name>",
        "<model> is quantized in a format that Drawplate does not read (<format>).",
    ),
    72: ("The adapter <adapter> was trained on <model> (sha256 <hash>) and is used on <other> (sha256 <hash>)",),
    65: ("PEFT does not load the adapter of this run on <class>: <reason>.",),
    36: (),
    46: (
        "The disk of <run> is full: <size> of prepared weights were removed from the cache.",
        "could not be written: No space left on device.",
        "The trained adapter is whole in <folder>.",
        "drawplate resume <run>",
    ),
    100: (
        "The unquantized base model was not measured with <adapter>: <reason>",
        "The base model as released was not measured with an adapter.",
        "on the 4-bit base model (nf4)",
    ),
    47: ("The self-check of loss and gradient was left out in part or whole: the device",),
    49: (
        "Self-check: <what is wrong>: <architecture> (model type <type>) is not carried out as it should be, and would "
        "be trained wrongly.",
        "Nothing was trained.",
    ),
    110: ("<folder> cannot be made: <file> is no folder",),
    48: (),
    80: (
        "<n> of <m> rows of <file> is left out, the first is row <k>: a message holds function_call",
        "<file> is left out: line <n>, column <m>: a quote closes its cell and the cell goes on",
        "<file>: not UTF-8, read as cp1252 (a guess: Western European",
        "<file> is left out: only <endings> are read.",
    ),
    81: (
        "The chat template closes the last answer of <n> of <m> conversations with no control token: the model will "
        "not learn to stop.",
        "The tokenizer has no end-of-sequence token, so nothing ends <n> of <m> training documents",
    ),
    82: (
        "<n> of <m> training documents are longer than data.max_length (<n> tokens) and have answers that keep only "
        "the end of what precedes them; <n> tokens of prompts are read nowhere.",
    ),
    91: (
        "Memory ran out where the plan did not expect it (MemoryError: planted).",
        "Drawplate failed unexpectedly (KeyError: <error>).",
        "The last good checkpoint is <folder>; the adapter and the report so far lie beside it.",
        "The log is <file>. Go on with: drawplate resume <run>",
    ),
    92: (
        "The cache of torch's compiler cannot be written (<error>).",
        "Set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to folders that you may write to",
        "The result could not be printed: standard output refuses it (<error>).",
        "Send standard output elsewhere, then give the same command again.",
        "The run is finished; its adapter, record and report are in <run>.",
    ),
    93: ("Drawplate runs as one process on one GPU, and this is one of <n> processes (WORLD_SIZE=<n>).",),
    94: (
        "a/<name> is not on this machine and could not be fetched: the hub answered 429 (Too Many Requests).",
        "the hub answered 500 (Internal Server Error). <safe> Try again in some minutes",
        "what answered is not the hub, but a page of somebody else's. <safe> Log in to this network with a browser",
        "the hub answered 403 (Forbidden). <safe> Ask its owner for access or run `hf auth login`",
    ),
    95: ("A change was accepted when the run was resumed: train.save_steps is 2 and was 1.",),
    90: (
        "train is given twice, in lines <a> and <b>.",
        "is empty",
        "lora.target_modules: it is read as a regular expression and is none (<error>)",
        "there is no key lora.use_dora: Drawplate trains plain LoRA and no DoRA; remove it",
    ),
}  # fmt: skip

ELSEWHERE = {
    113: "an adapter that is measured on documents it was trained on",
    114: "a name longer than the system allows, several paths in one, the home of nobody, a comment sign in a value",
    28: "PDF bomb, page bomb, encrypted or truncated PDF (PDFs are not read)",
    29: "DOCX or EPUB zip bomb, lying sizes, nested zips (neither is read)",
    30: "HTML nested 200,000 deep; a line of 1 GB",
    31: "XXE, billion laughs, external DTD",
    32: "traversal names, symlinks, loops, FIFOs, devices, a sparse 1 TB file",
    33: "wrong encodings, NUL, ANSI and bidi escapes",
    34: "markup in names, text, model name",
    37: "special tokens or chat tags inside documents",
    38: "export interrupted; merged or GGUF perplexity off (there is no export yet)",
}

DOCUMENTS, REPORT = "tests/data/test_documents.py", "tests/report/test_html.py"
NOT_READ = (DOCUMENTS, "links_pipes_sockets_hidden_and_foreign_files_are_skipped_unopened")
HELD_ELSEWHERE: dict[int, tuple[tuple[str, str], ...]] = {
    113: (("tests/run/test_evaluate.py", "documents_that_an_adapter_was_trained_on_are_counted"),),
    114: (
        (DOCUMENTS, "a_path_that_cannot_be_and_several_in_one_are_refused_in_words"),
        ("tests/test_cli.py", "a_name_that_no_file_can_have_ends_in_words"),
        ("tests/recipe/test_recipe.py", "the_home_of_nobody_is_refused"),
        ("tests/recipe/test_recipe.py", "a_value_on_the_command_line_has_no_comment_that_could_be_cut_off"),
    ),
    28: (NOT_READ,),  # only text, HTML and tables are read; a PDF is skipped, counted and never opened
    29: (NOT_READ, (DOCUMENTS, "a_parquet_file_that_would_fill_the_memory_is_refused")),
    30: (
        (DOCUMENTS, "html_nested_deeper_than_any_tree_is_read"),
        (DOCUMENTS, "a_page_of_one_long_line_is_read_whole"),
        (DOCUMENTS, "a_large_page_without_text_is_refused"),
    ),
    31: ((DOCUMENTS, "external_entities_are_not_read"),),
    32: (NOT_READ, (DOCUMENTS, "a_sparse_terabyte_is_skipped_unopened")),
    33: (
        (DOCUMENTS, "encodings_are_recognised_and_repairs_said"),
        (DOCUMENTS, "names_are_shown_without_control_characters_or_broken_bytes"),
        ("tests/report/test_visible.py", "what_a_terminal_or_browser_would_obey_is_written_out"),
    ),
    34: (
        (REPORT, "hostile_text_is_shown_and_never_obeyed"),
        (REPORT, "the_page_runs_nothing_and_loads_nothing"),
        ("tests/report/test_card.py", "hostile_text_stays_text"),
    ),
    37: (
        ("tests/data/test_tokens.py", "control_tokens_inside_a_document_are_text"),
        ("tests/data/chat/test_template.py", "control_tokens_written_by_a_person_stay_text"),
    ),
}
"""Row -> (file, test without its `test_`); row 38 waits for an export."""


def shows(row: int, text: str, which: int = 0) -> None:
    """Assert that what a person saw has the sentence that the matrix promises."""
    sentence = SEES[row][which]
    pattern = ".+?".join(re.escape(part) for part in re.split(r"<[^>]*>", sentence))
    seen = " ".join(text.split())
    assert re.search(pattern, seen), f"row {row} promises {sentence!r}; seen: {seen[-2000:]}"
