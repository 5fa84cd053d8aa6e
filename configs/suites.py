"""Cases of `djepa --mode=benchmark --suite=gpu` in their order: name, part of the benchmark, flags.

    export XLA_FLAGS=--xla_gpu_enable_triton_gemm=false
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
L = "--config=djepa_l --config.batch_size=96 --config.sample.batch_size=64"
H = "--config=djepa_h --config.batch_size=48 --config.sample.batch_size=64"
STEPS, BATCHES = "--steps=5 --repeats=3 --warmup=1", "--repeats=2 --warmup=1"
UNGUIDED = "--config.sample.cfg_scale=1"
DEBUG = "--config=djepa_b:debug --steps=2 --repeats=2 --warmup=1"

# Seconds on one H100. The first seven were seen in one go, beside other trainings until the end of
# `resume`; the first five, 429 together, fit the default limit. The others are estimates from
# single cases: 15 to start, 5 to trace, 30 to 70 to compile, 0.34 to 0.45 a step, 5 a batch.
GPU = {
    "parity": ("parity", SMALL),  # 30
    "attention": ("attention", B),  # 17
    "resume": ("resume", "--config=digits --config.num_steps=600"),  # 221, three trainings
    "b_train": ("train", f"{B} {STEPS}"),  # 91, all layers unrolled
    "b_sample": ("sample", f"{B} {UNGUIDED} {BATCHES}"),  # 68
    "b_train_scan": ("train", f"{B} {STEPS} --config.model.scan_unroll=1"),  # 42
    "b_train_kernels": ("train", f"{B} {STEPS} --profile"),  # 28, compiled before
    "b_denoise_kernels": ("denoise", f"{B} {UNGUIDED} {STEPS} --profile"),  # 30
    "b_guided": ("sample", f"{B} {BATCHES}"),  # 110
    "b_latency": ("sample", f"{B} {UNGUIDED} {BATCHES} --batch_sizes=1"),  # 90
    "decode_1": ("decode", f"{B} --batch_sizes=1"),  # 30
    "decode_32": ("decode", f"{B} --batch_sizes=32"),  # 30
    "l_train": ("train", f"{L} {STEPS}"),  # 100
    "h_train": ("train", f"{H} {STEPS}"),  # 52
    "l_sample": ("sample", f"{L} {UNGUIDED} {BATCHES}"),  # 120
    "h_sample": ("sample", f"{H} {UNGUIDED} {BATCHES}"),  # 150
    "l_guided": ("sample", f"{L} {BATCHES}"),  # 150
    "h_guided": ("sample", f"{H} {BATCHES}"),  # 200
    "b_train_plain": ("train", f"{B} {STEPS} --config.model.attention=plain"),  # 150
    "b_sample_plain": ("sample", f"{B} {UNGUIDED} {BATCHES} --config.model.attention=plain"),  # 120
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
