"""Cases of `djepa --mode=benchmark --suite=gpu` in their order: name, part of the benchmark, flags.

    djepa --mode=benchmark --suite=gpu --time_limit=2700 --out=here.json

Each runs in a process of its own. Two parts are the suite's alone: `resume`, whose flags are those
of a training that is stopped and goes on, and `tests`, with names of files below tests/core. `tiny`
is the same code on tiny networks, to try it out on any machine.
"""

SMALL = (  # the digits' shapes, narrow
    "--config=digits --config.batch_size=16 --config.model.width=32 --config.model.encoder_depth=2 "
    "--config.model.predictor_depth=2 --config.model.denoiser_depth=2 "
    "--config.model.denoiser_width=32 --config.model.scan_unroll=1 --config.sample.num_ar_steps=4 "
    "--config.sample.num_denoise_steps=6 --config.sample.num_segments=1"
)
B = "--config=djepa_b --config.batch_size=256 --config.sample.batch_size=256"
L = "--config=djepa_l --config.batch_size=64 --config.sample.batch_size=64"
H = "--config=djepa_h --config.batch_size=32 --config.sample.batch_size=64"
STEPS, BATCHES = "--steps=5 --repeats=5 --warmup=1", "--repeats=2 --warmup=1"
UNGUIDED = "--config.sample.cfg_scale=1"
CUDNN = "--config.model.attention=cudnn --config.model.attention_dropout=0"
DEBUG = "--config=djepa_b:debug --steps=2 --repeats=2 --warmup=1"

# Seconds on one H100 as estimated, not measured: 10 to start, 45 to 90 to compile B for the first
# time, 0.82 a step, 13 a batch of samples. The first five, 445 together, fit the default limit.
GPU = {
    "parity": ("parity", SMALL),  # 40
    "attention": ("attention", B),  # 40
    "resume": ("resume", "--config=digits --config.num_steps=600"),  # 120, three programs
    "b_train": ("train", f"{B} {STEPS}"),  # 105
    "b_sample": ("sample", f"{B} {UNGUIDED} {BATCHES}"),  # 140
    "b_train_fused": ("train", f"{B} {STEPS} --config.model.attention=fused"),  # 105
    "b_sample_cudnn": ("sample", f"{B} {UNGUIDED} {BATCHES} {CUDNN}"),  # 140
    "b_train_kernels": ("train", f"{B} {STEPS} --profile"),  # 50, compiled before
    "b_denoise_kernels": ("denoise", f"{B} {UNGUIDED} {STEPS} --profile"),  # 40
    "b_guided": ("sample", f"{B} {BATCHES}"),  # 180
    "b_latency": ("sample", f"{B} {UNGUIDED} {BATCHES} --batch_sizes=1"),  # 120
    "decode_1": ("decode", f"{B} --batch_sizes=1"),  # 40
    "decode_32": ("decode", f"{B} --batch_sizes=32"),  # 50
    "l_train": ("train", f"{L} {STEPS}"),  # 120
    "l_sample": ("sample", f"{L} {UNGUIDED} {BATCHES}"),  # 140
    "l_guided": ("sample", f"{L} {BATCHES}"),  # 170
    "h_train": ("train", f"{H} {STEPS}"),  # 140
    "h_sample": ("sample", f"{H} {UNGUIDED} {BATCHES}"),  # 180
    "h_guided": ("sample", f"{H} {BATCHES}"),  # 240
    "tests": ("tests", "test_parity_*.py"),  # 300
}
TINY = {
    "parity": ("parity", SMALL),
    "attention": ("attention", DEBUG),
    "resume": ("resume", f"{SMALL} --config.num_steps=600 --config.evaluation.count=70"),
    "b_train": ("train", DEBUG),
    "b_sample": ("sample", f"{DEBUG} {UNGUIDED}"),
    "b_train_kernels": ("train", f"{DEBUG} --profile"),
    "b_denoise_kernels": ("denoise", f"{DEBUG} {UNGUIDED} --profile"),
    "b_guided": ("sample", DEBUG),
    "b_latency": ("sample", f"{DEBUG} {UNGUIDED} --batch_sizes=1"),
    "decode_1": ("decode", f"{DEBUG} --config.data.image_size=2 --batch_sizes=1"),
    "tests": ("tests", "test_parity_optimizer.py"),
}
SUITES = {"gpu": GPU, "tiny": TINY}
