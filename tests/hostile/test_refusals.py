"""What commands are asked and cannot do: a line that names the trouble, status 2, and nothing is changed."""

from __future__ import annotations

import shlex

import pytest

LONG = "x" * 300
LINES = 3  # at most
# Command, arguments, and what the message must name.
REFUSED = [
    # plt train: the file
    ("train", "", "CONFIG.yaml"),
    ("train", "nowhere.yaml", "nowhere.yaml"),
    ("train", "data", "data"),
    ("train", "loop", "loop"),
    ("train", "notes.txt", "notes.txt:1"),
    ("train", "empty.yaml", "train_iters"),
    ("train", "data/text.bin", "text.bin"),
    # ... settings by themselves
    ("train", "run.yaml modle.num_layers=2", "did you mean model"),
    ("train", "run.yaml model.num_layers=0", "model.num_layers"),
    ("train", f"run.yaml name={LONG}", "300 bytes"),
    ("train", "run.yaml 'data.sources=[{path: data/text}'", "data.sources"),
    ("train", "run.yaml training.tp_comm_overlap=true", "tp_comm_overlap"),
    # ... settings together
    ("train", "run.yaml parallel.tensor_model_parallel_size=3", "tensor_model_parallel_size"),
    ("train", "run.yaml data.split=0,1,0", "data.split"),
    # ... files that they name
    ("train", "run.yaml data.sources=[]", "data.sources"),
    ("train", "run.yaml 'data.sources=[{path: nowhere}]'", "nowhere.bin"),
    ("train", "run.yaml 'data.sources=[{path: data/text.bin}]'", "data/text"),
    ("train", "run.yaml name=new 'data.sources=[{path: data/cut}]'", "data/cut.bin"),
    ("train", "run.yaml name=new 'data.sources=[{path: data/short}]'", "data/short.idx"),
    ("train", "run.yaml data.tokenizer=nowhere.model", "nowhere.model"),
    ("train", "run.yaml data.tokenizer=no_data", "no_data"),
    ("train", "run.yaml data.tokenizer=notes.txt", "notes.txt"),
    ("train", "run.yaml data.tokenizer=tokenizer_of_notes", "tokenizer_of_notes"),
    ("train", "run.yaml name=new model.vocab_size=5", "model.vocab_size"),
    ("train", "run.yaml name=new checkpoint.load=nowhere", "nowhere"),
    ("train", "run.yaml output_dir=notes.txt", "notes.txt"),
    ("train", "run.yaml output_dir=/proc/nowhere", "/proc"),
    # ... a run that is there
    ("train", "run.yaml optimizer.lr=0.5", "runs/mine is finished optimizer.lr name=NEW"),
    ("train", "run.yaml training.train_iters=4", "training.train_iters checkpoint.allow_other_schedule=true"),
    ("train", "run.yaml training.train_iters=4", "optimizer.lr_decay_iters=2 checkpoint.allow_other_data=true"),
    ("train", "run.yaml training.train_iters=4 optimizer.lr_decay_iters=2", "checkpoint.allow_other_data=true"),
    ("train", "run.yaml model.hidden_size=64", "model.hidden_size 32"),
    ("train", "run.yaml model.num_layers=2", "model.num_layers 1"),
    ("train", "run.yaml model.vocab_size=999", "vocabulary"),
    ("train", "run.yaml optimizer.name=sgd", "optimizer.name adam"),
    ("train", "runs/mine/config.yaml training.train_iters=4", "training.train_iters"),
    ("train", "run.yaml name=new checkpoint.load=runs/mine model.hidden_size=64", "model.hidden_size"),
    ("train", "run.yaml name=new checkpoint.load=runs/mine training.train_iters=4", "training.train_iters"),
    (
        "train",
        "run.yaml name=new checkpoint.load=runs/mine",
        "checkpoint.load checkpoint.weights_only=true training.train_iters",
    ),
    ("train", "--branch-from runs/mine", "RUN@STEP"),
    ("train", "--branch-from runs/mine@99", "99"),
    ("train", "--branch-from runs/mine@2", "WSD"),
    ("train", "--branch-from nowhere@1", "nowhere"),
    ("train", "run.yaml --decay-steps 3", "--branch-from"),
    # plt preprocess
    ("preprocess", "", "--input"),
    ("preprocess", "--input text.jsonl --output-prefix o", "--tokenizer"),
    ("preprocess", "--input nowhere --tokenizer tokenizer --output-prefix o", "nowhere"),
    ("preprocess", "--input data --tokenizer tokenizer --output-prefix o", "folder"),
    ("preprocess", "--input loop --tokenizer tokenizer --output-prefix o", "link"),
    ("preprocess", "--input 'data/*.jsonl' --tokenizer tokenizer --output-prefix o", "data/*.jsonl"),
    ("preprocess", "--input text.jsonl --tokenizer nowhere --output-prefix o", "nowhere"),
    ("preprocess", "--input text.jsonl --tokenizer notes.txt --output-prefix o", "notes.txt"),
    ("preprocess", "--input text.jsonl --tokenizer tokenizer --output-prefix o/", "o/"),
    ("preprocess", "--input text.jsonl --tokenizer tokenizer --output-prefix /proc/o", "/proc"),
    ("preprocess", "--input text.jsonl --tokenizer tokenizer --output-prefix notes.txt/o", "notes.txt"),
    *(
        ("preprocess", f"--input text.jsonl --tokenizer tokenizer --output-prefix o {option}", option.split()[0])
        for option in (
            *("--shard-mb nan", "--shard-mb inf", "--shard-mb 0", "--shard-mb -1", "--shard-mb x"),
            *("--workers 0", "--workers -3", "--max-document-bytes 0", "--max-document-bytes 9999999999999"),
            *("--format csv", "--min-quality 3", "--quality-key q"),
        )
    ),
    ("preprocess", "--input text.jsonl --tokenizer tokenizer --output-prefix o --eod-token '<no>'", "<no>"),
    ("preprocess", "--input empty.jsonl --tokenizer tokenizer --output-prefix data/text", "--overwrite"),
    ("preprocess", "--build-index nowhere.yaml", "nowhere.yaml"),
    ("preprocess", "--build-index run.yaml model.x=1", "model.x"),
    ("preprocess", "--build-index run.yaml 'data.sources=[{path: data/cut}]'", "data/cut.bin"),
    # plt train-tokenizer
    ("train-tokenizer", "--input nowhere --output o --vocab-size 380", "nowhere"),
    ("train-tokenizer", "--input text.jsonl --output tokenizer --vocab-size 380", "tokenizer.model"),
    ("train-tokenizer", "--input text.jsonl --output notes.txt --vocab-size 380", "notes.txt"),
    ("train-tokenizer", "--input text.jsonl --output /proc/o --vocab-size 380", "/proc"),
    ("train-tokenizer", "--input empty.jsonl --output o --vocab-size 380", "text"),
    ("train-tokenizer", "--input latin.jsonl --output o --vocab-size 380", "text"),
    *(
        ("train-tokenizer", f"--input text.jsonl --output o --vocab-size {size}", "--vocab-size")
        for size in ("-5", "0", "5", "90000", "1000000000000", "many")
    ),
    *(
        ("train-tokenizer", f"--input text.jsonl --output o --vocab-size 380 {option}", name)
        for option, name in (
            *(("--threads 0", "--threads"), ("--character-coverage 5", "--character-coverage")),
            *(("--character-coverage nan", "--character-coverage"), ("--max-sample-mb 0", "--max-sample-mb")),
            *(("--special-token ''", "empty"), ("--special-token '<s>'", "<s>"), ("--special-token 'a b'", "a b")),
            *(("--special-token a --user-defined-symbol a", "twice"), ("--model-type wordy", "--model-type")),
        )
    ),
    # plt config
    ("config", "upgrade nowhere.yaml", "nowhere.yaml"),
    ("config", "upgrade data", "data"),
    ("config", "rewrite run.yaml", "rewrite"),
    ("config", "upgrade", "FILE"),
    # plt inspect-data
    ("inspect-data", "nowhere.yaml", "nowhere.yaml"),
    ("inspect-data", "run.yaml --batch 0", "--batch"),
    ("inspect-data", "run.yaml --batch 999999999", "batch"),
    ("inspect-data", "run.yaml --samples 0", "--samples"),
    ("inspect-data", "run.yaml --width -1", "--width"),
    ("inspect-data", "run.yaml --duplicates --span-tokens 1", "--span-tokens"),
    ("inspect-data", "run.yaml --html data", "data"),
    ("inspect-data", "run.yaml --part test", "--part"),
    ("inspect-data", "run.yaml 'data.sources=[{path: data/cut}]'", "data/cut.bin"),
    # plt estimate, plt rehearse, plt check-coordinates
    ("estimate", "nowhere.yaml", "nowhere.yaml"),
    ("estimate", "run.yaml --gpu abacus", "abacus"),
    ("estimate", "run.yaml --layout TP0", "tensor_model_parallel_size"),
    ("estimate", "run.yaml --layout 'fast please'", "--layout"),
    ("estimate", "run.yaml --nodes 0", "nodes"),
    ("estimate", "run.yaml --gpus-per-node -1", "gpus-per-node"),
    ("estimate", "run.yaml --context 0", "context"),
    ("estimate", "run.yaml --batch 0", "batch"),
    ("estimate", "run.yaml --search --top 0", "top"),
    ("estimate", "run.yaml data.tokenizer=notes.txt", "notes.txt"),
    ("rehearse", "nowhere.yaml", "nowhere.yaml"),
    ("rehearse", "run.yaml --nodes 0", "--nodes"),
    ("rehearse", "run.yaml --gpu abacus", "abacus"),
    ("check-coordinates", "nowhere.yaml", "nowhere.yaml"),
    ("check-coordinates", "run.yaml --steps 0", "--steps"),
    ("check-coordinates", "run.yaml --axes height", "--axes"),
    # plt export
    ("export", "--checkpoint nowhere --output o", "nowhere"),
    ("export", "--checkpoint notes.txt --output o", "notes.txt"),
    ("export", "--checkpoint runs/unstarted --output o", "runs/unstarted"),
    ("export", "--checkpoint weightless --output o", "weightless"),
    ("export", "--checkpoint broken_hf --output o", "broken_hf"),
    ("export", "--checkpoint runs/mine --output notes.txt/o", "notes.txt"),
    ("export", "--checkpoint runs/mine --output /proc/o", "/proc"),
    ("export", "--checkpoint runs/mine --output o --dtype fp8", "--dtype"),
    ("export", "--checkpoint runs/mine --output o --max-shard-size 0", "0"),
    ("export", "--checkpoint runs/mine --output o --tokenizer nowhere", "nowhere"),
    ("export", "--checkpoint runs/mine --output o --tokenizer notes.txt", "notes.txt"),
    ("export", "--checkpoint runs/mine --output o --ema", "ema_decay"),
    ("export", "--checkpoint exported --output o --ema", "--ema"),
    # plt import
    ("import", "--model nowhere --output o", "nowhere"),
    ("import", "--model other_hf --output o", "resnet"),
    ("import", "--model weightless --output o", "weightless"),
    ("import", "--model exported --output data", "data"),
    ("import", "--model exported --output o --loop-count 9999", "loop"),
    ("import", "--model exported --output o --loop-span 0 1", "--loop-span"),
    ("import", "--model exported --output o --preset recommended", "--preset"),
    # plt average
    ("average", "runs/mine --output o", "runs/mine"),
    ("average", "runs/mine@2 --output o", "one checkpoint"),
    ("average", "runs/mine@2 runs/mine@2 --output o", "twice"),
    ("average", "runs/mine@1 runs/mine@2 --output o", "step 1"),
    ("average", "nowhere@1 nowhere@2 --output o", "nowhere"),
    ("average", "runs/mine --last 0 --output o", "--last"),
    ("average", "runs/mine --last 9 --output o", "--last"),
    ("average", "runs/mine@2 --ema --output o", "ema_decay"),
    ("average", "runs/mine@2 --ema --weights 1 2 --output o", "--weights"),
    ("average", "runs/mine@2 --ema --weights nan --output o", "--weights"),
    ("average", "runs/mine@2 --ema --output data", "data"),
    # plt generate, plt evaluate, plt diagnose
    ("generate", "--model exported", "--prompt"),
    ("generate", "--model nowhere --prompt a", "nowhere"),
    ("generate", "--model runs/mine --prompt a", "plt export"),
    ("generate", "--model weightless --prompt a", "weightless"),
    ("generate", "--model exported --prompt ''", "prompt"),
    ("generate", "--model exported --prompt a --max-new-tokens 0", "--max-new-tokens"),
    ("generate", "--model exported --prompt a --max-new-tokens 1000000", "--max-new-tokens"),
    ("generate", "--model exported --prompt a --temperature nan", "--temperature"),
    ("generate", "--model exported --prompt a --seed -1", "--seed"),
    ("evaluate", "--model nowhere --tasks a", "nowhere"),
    ("evaluate", "--model exported --tasks ,", "--tasks"),
    ("evaluate", "--model exported --tasks a --limit 0", "--limit"),
    ("evaluate", "--model exported --tasks a --include-path nowhere", "nowhere"),
    ("evaluate", "--model exported --tasks a --device tpu", "tpu"),
    ("evaluate", "--model exported --tasks a --device cuda:99", "cuda:99"),
    ("diagnose", "exported --data data", "data"),
    ("diagnose", "exported --data data/cut", "data/cut.bin"),
    ("diagnose", "exported --data text.jsonl --seed -1", "--seed"),
    ("diagnose", "exported --data text.jsonl --device tpu", "--device"),
    # plt plot, plt status, plt report
    ("plot", "nowhere", "nowhere"),
    ("plot", "runs/unstarted", "runs/unstarted"),
    ("plot", "runs/garbled", "metrics.jsonl"),
    ("plot", "runs/mine --labels a b", "2 labels"),
    ("plot", "runs/mine --output plot.word", "plot.word"),
    ("plot", "runs/mine --output /proc/plot.png", "/proc"),
    ("status", "nowhere/at/all", "nowhere"),
    ("status", "--output-dir nowhere", "nowhere"),
    ("report", "nowhere", "nowhere"),
    ("report", "runs/mine", "runs/mine"),
    ("report", "runs/mine --decode-batch 0", "--decode-batch 1"),
    # plt archive
    ("archive", "nowhere out", "nowhere"),
    ("archive", "notes.txt out", "notes.txt"),
    ("archive", "data out", "data"),
    ("archive", "archived/smoke", "OUTPUT"),
    ("report", "archived/smoke", "archived/smoke/records.tar.xz"),
    ("report", "archived/smoke --measure-decode", "archived/smoke/records.tar.xz tar"),
    ("status", "archived/smoke", "archived/smoke/records.tar.xz tar"),
    # plt sweep, plt study, plt submit
    ("sweep", "nowhere.yaml", "nowhere.yaml"),
    ("sweep", "run.yaml", "run.yaml"),
    ("sweep", "configs/sweeps/smoke.yaml seeds=[]", "seeds"),
    ("sweep", "configs/sweeps/smoke.yaml 'axes.model.no_such=[1]'", "no_such"),
    ("sweep", "configs/sweeps/smoke.yaml --jobs 0", "--jobs"),
    ("sweep", "configs/sweeps/smoke.yaml --slurm", "--cluster"),
    ("sweep", "configs/sweeps/smoke.yaml --max-concurrent 2", "--slurm"),
    ("sweep", "configs/sweeps/smoke.yaml output_dir=/proc/nowhere", "/proc"),
    ("sweep", "configs/sweeps/smoke.yaml output_dir=archived", "archived/smoke/records.tar.xz tar"),
    ("sweep", "configs/sweeps/smoke.yaml output_dir=archived --dry-run", "archived/smoke/records.tar.xz tar"),
    ("study", "configs/studies/smoke.yaml output_dir=archived", "archived/smoke/records.tar.xz tar"),
    ("study", "configs/studies/smoke.yaml output_dir=archived --report", "archived/smoke/records.tar.xz"),
    ("study", "configs/studies/smoke.yaml output_dir=/proc/nowhere", "/proc"),
    ("study", "nowhere.yaml", "nowhere.yaml"),
    ("study", "run.yaml", "run.yaml"),
    ("study", "configs/studies/smoke.yaml --budget soon", "budget"),
    ("study", "configs/studies/smoke.yaml rounds=0", "rounds"),
    ("study", "configs/studies/smoke.yaml --report --dry-run", "--report"),
    ("submit", "", "configuration"),
    ("submit", "run.yaml", "--time"),
    ("submit", "run.yaml --time 1:00:00 --cluster nowhere", "nowhere"),
    ("submit", "--array nowhere --time 1:00:00 --dry-run", "nowhere"),
    # plt upload
    ("upload", "nowhere", "nowhere"),
    ("upload", "exported", "--to"),
    ("upload", "exported --to nowhere://x", "nowhere"),
    ("upload", "runs/mine", "checkpoint.uploads.to"),
    ("upload", "runs/mine --check", "checkpoint.uploads.to"),
    ("upload", "runs/mine --to file:///tmp/x", "--to"),
    ("demo", "please", "please"),
    ("doctor", "please", "please"),
]


@pytest.mark.parametrize(("command", "arguments", "names"), REFUSED, ids=[" ".join(case[:2])[:80] for case in REFUSED])
def test_it_is_refused_in_a_line_and_leaves_no_trace(world, command, arguments, names):
    before = world.content()
    done = world.run(command, *shlex.split(arguments))
    lines = done.stderr.splitlines()
    said = f"{done.stdout}{done.stderr}"
    assert done.returncode == 2 and 1 <= len(lines) <= LINES, said
    assert all(line.startswith("error: ") for line in lines) and not done.stdout, said
    missing = [name for name in names.split() if name not in done.stderr]
    assert not missing, f"{missing} not in {said}"
    after = world.content()
    assert after == before, {name for name in before | after if before.get(name) != after.get(name)}
