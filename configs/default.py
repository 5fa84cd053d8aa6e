"""Every key of the configuration with its default: the faithful ImageNet recipe in VAE latents.

Other files change what they need. `--config.KEY=VALUE` overrides any of them on the command line.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """The defaults; takes no variant."""
    if variant:
        raise ValueError(f'default.py has no variant "{variant}".')
    config = ConfigDict()
    config.num_steps = 875_000  # optimiser steps of the whole training
    config.batch_size = 2048  # examples per step, over all devices
    # parts of a batch one after the other (same result); 0 = as few as fit the memory
    config.grad_accumulation_steps = 0
    config.seed = 0  # initial values, masks, noise, order of the data
    # of the matrix products: bfloat16, or float32 (true float32, slow on accelerators)
    config.compute_dtype = "bfloat16"
    config.mesh = (-1, 1, 1)  # devices along (data, fsdp, tensor); -1 = what is left
    config.checkpoint_every = 5000  # steps; one is always written at the end
    config.keep_checkpoints = 2  # the newest that stay
    config.keep_every = 0  # those of steps that this divides stay as well; 0 = of none
    config.log_every = 100  # steps between lines of metrics
    config.sample_every = 5000  # steps between sample grids, one at the end; 0 = none at all
    config.evaluate_every = 0  # steps between evaluations; 0 = only at the end
    config.max_bad_steps = 20  # non-finite gradients in a row that end the run

    config.model = _model()
    config.loss = _loss()
    config.optimizer = _optimizer()
    config.data = _data()
    config.prepare = _prepare()
    config.autoencoder = _autoencoder()
    config.sample = _sample()
    config.debug = _debug()
    config.evaluation = _evaluation()
    config.search = _search()
    return config


def _model() -> ConfigDict:
    """The networks."""
    model = ConfigDict()
    model.size = "L"  # B, L, H: the published scales; "custom" needs the next six keys
    model.width = 0  # 0 = as the size says
    model.encoder_depth = 0
    model.predictor_depth = 0
    model.num_heads = 0
    model.denoiser_depth = 0
    model.denoiser_width = 0
    model.mlp_ratio = 4.0
    model.num_prefix_tokens = 64  # class-carrying tokens in front of the sequence
    model.qk_norm = True
    model.dropout = 0.1  # after projections and inside the MLPs
    model.attention_dropout = 0.1  # on attention weights
    # how it is computed: plain (anywhere), cudnn (NVIDIA GPUs; bfloat16, no attention_dropout),
    # fused (GPUs; a kernel that keeps no weights), or auto: what was measured best on the platform
    model.attention = "auto"
    model.remat = "dots"  # none, dots (keep matrix products), full (keep nothing)
    model.scan_unroll = 1  # layers per iteration of the scans; more compile longer, may be faster
    # classes; class_pair: two labels (data.labels); text: captions (data.captions); embeddings:
    # outputs of a text encoder; or nothing: no labels at all
    model.condition = "classes"
    # second_classes of class_pair, a number; length (of a text, in bytes or outputs), width, depth
    # and num_heads of text and embeddings; channels of embeddings
    model.condition_options = ConfigDict()
    return model


def _loss() -> ConfigDict:
    """What is minimised, and what is hidden and masked for it."""
    loss = ConfigDict()
    # diffusion, flow_matching, x_prediction or shortcut (which goes on from flow_matching)
    loss.name = "diffusion"
    # Arguments of that loss: clip_x0 of diffusion (clip the implied clean token to +- this; 0 =
    # off); time_shift of the others (bends the time grid); flow_share of shortcut (draws without a
    # length); time_mean, time_deviation (of the logits of times) and min_rest (the least 1 - t) of
    # x_prediction. Those left out have its defaults.
    loss.options = ConfigDict()
    loss.token_weight = 1.0
    loss.jepa_weight = 1.0  # 0 leaves the JEPA head out
    loss.label_drop_prob = 0.1  # share of labels hidden in training, for guidance
    loss.noise_multiplicity = 4  # draws of (time, noise) per token and step
    loss.mask_ratio_min = 0.7
    loss.mask_ratio_std = 0.25
    # examples that share a ratio: 1 each its own, 32 as the authors, 0 the whole batch
    loss.mask_group = 1
    # which tokens are shown: the first ones of an order (as for sample.order), or of several with
    # shares, such as random:0.6,frame_causal:0.2,ends:0.2; of pairs also first and second
    loss.mask_modes = "random"
    return loss


def _optimizer() -> ConfigDict:
    """How it is minimised."""
    optimizer = ConfigDict()
    optimizer.learning_rate = 8e-4
    optimizer.learning_rate_schedule = "constant"  # after the warm-up: constant or cosine
    optimizer.min_learning_rate = 0.0  # end of the cosine
    optimizer.warmup_steps = 62_500
    optimizer.weight_decay = 0.0  # see docs/differences.md
    optimizer.weight_decay_schedule = "constant"  # constant, or linear from 0
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.epsilon = 1e-6
    optimizer.clip_norm = 3.0  # global norm
    optimizer.ema_decay = 0.9999
    optimizer.ema_ramp = False  # raise the decay linearly towards 1, capped at 0.9999
    # what is trained: all, or some of context_encoder, predictor, jepa_head and denoiser with
    # commas between them; the others stay as they are
    optimizer.parts = "all"
    return optimizer


def _data() -> ConfigDict:
    """What is learned from."""
    data = ConfigDict()
    # digits, moving_mnist, paired, npz, folder, tar, ilsvrc, tfds, synthetic, or latents (a cache
    # of --mode=prepare)
    data.source = "latents"
    # Arguments of that source: num_digits, digit_size (of 64 pixels) and num_clips of moving_mnist;
    # pictures, sounds (files), sound_labels and num_pairs of paired (data/paired.py)
    data.source_options = ConfigDict()
    data.path = ""  # of the source; latents and npz may be in a bucket, gs://...
    # local folder for copies of what is in a bucket; "" = ~/.cache/djepa_jax/staged
    data.staging = ""
    data.device_resident = False  # keep the latent cache in the devices' memory
    data.unconditional = False  # count every image to one class; with num_classes 1
    data.max_broken = 100  # image files that may be skipped because they cannot be read
    # image_pixels, image_lapped, image_latents; video_pixels, video_lapped, video_latents (of the
    # frames of clips); audio_mel: recordings (npz or folder), or joint: pairs of two of these, but
    # for latents
    data.modality = "image_latents"
    # Arguments of that modality: cutoff and colour_cutoff of image_lapped and video_lapped, the
    # highest frequencies that tokens keep, as shares of the highest that there are; num_frames and
    # patch_frames (in a token) of clips; audio_mel has rate, n_fft, hop, mels, frames, patch_mels,
    # patch_frames, floor, mean and deviation (core/modalities/audio.py); joint has first and
    # second, each with the key modality and the options of that
    data.options = ConfigDict()
    # npz: the arrays of labels, one name, or two with commas for model.condition "class_pair"; of
    # wav files, what the parts of their names are: "digit,speaker" for 7_jackson_32.wav. "": the
    # array "labels", folders
    data.labels = ""
    # where captions are. npz: the name of an array of texts ("": captions), or of outputs of a text
    # encoder [n, L, channels] (embeddings); folder: a JSON file {"FILE": "CAPTION"} in it
    # (captions.json); tar: the ending of the files that hold them (.txt)
    data.captions = ""
    data.held_out = 0.0  # share of the captions that are kept from training, by a hash of each
    data.image_size = 16  # side of the image, or of the latent map
    data.channels = 16
    data.patch_size = 1
    # of latents: the network sees (latents - shift) * scale. 0.2325 is for kl16; the published
    # one for kl8 is 0.18215
    data.latent_scale = 0.2325
    data.latent_shift = 0.0
    data.num_classes = 1000  # 0 = as many as the data have
    # imagenet (told by WordNet ids), a text file with one name per line, or "" for the names that
    # the data have (numbers, where they have none)
    data.class_names = "imagenet"
    data.random_flip = False
    # of each process, that read examples; their number changes nothing but the speed
    data.num_threads = 4
    return data


def _prepare() -> ConfigDict:
    """What --mode=prepare makes a latent cache of."""
    prepare = ConfigDict()
    prepare.source = "folder"  # folder, tar, ilsvrc, tfds or npz
    prepare.path = ""
    prepare.image_size = 256  # side after the crop
    prepare.shard_size = 4096  # images per file
    prepare.dtype = "bfloat16"  # of the moments: bfloat16 or float32
    prepare.max_broken = 100  # images that may be skipped because they cannot be read
    return prepare


def _autoencoder() -> ConfigDict:
    """Between pictures and latents."""
    autoencoder = ConfigDict()
    # kl16, or kl8 (needs data.channels 4, data.image_size 32, another data.latent_scale)
    autoencoder.name = "kl16"
    autoencoder.path = ""  # its weights; needed for preparing, and for pictures from latents
    autoencoder.sha256 = ""  # of these weights; training takes it from the latent cache
    autoencoder.batch_size = 32  # pictures per call
    autoencoder.dtype = "bfloat16"  # of decoding; encoding is always float32
    return autoencoder


def _sample() -> ConfigDict:
    """What sampling makes, and how."""
    sample = ConfigDict()
    sample.labels = "all"  # "all" in turn, or a list such as 3,3,7
    sample.prompt = ""  # of models of texts, in place of labels: "a red circle", several with |
    sample.mix = (
        ""  # in place of these, several with weights, 3:0.5,8:0.5, or places, 3@left,8@right
    )
    sample.count = 64  # pictures
    sample.seed = 0
    # in which tokens are revealed: random, raster, halton, checkerboard, blue_noise, frame_causal,
    # or, of pairs, first or second: that part before the other
    sample.order = "random"
    sample.reveal = "cosine"  # how many in each step: cosine, or halves (core/schedules.py)
    sample.cfg_scale = 3.0  # 1 = no guidance
    sample.cfg_schedule = "linear"  # linear or constant
    sample.cfg_start = 0.0  # share of the autoregressive steps from which on there is guidance
    sample.cfg_stop = 1.0  # and up to which; steps without it take less time
    sample.cfg_denoise_start = 0.0  # the same in the denoising steps of each token
    sample.cfg_denoise_stop = 1.0
    # a weaker model of the same shape to lead away from as well, such as an earlier step of the
    # training (keep_every): its workdir, step or export
    sample.guide = ""
    sample.guide_scale = 1.5  # how far; 1 = not at all
    sample.reuse_unconditional = 1  # of so many guided steps one runs the unconditional half anew
    sample.temperature = 0.98
    sample.num_ar_steps = 64
    sample.num_denoise_steps = 100
    sample.final_denoise_steps = 0  # to which they fall towards the last step; 0 = all the same
    # ddpm, ddim of diffusion; euler, but for shortcut heun or ancestral, too
    sample.sampler = "ddpm"
    sample.batch_size = 64  # pictures per call
    sample.num_segments = 8  # scan segments of the loop: more compile longer and pad less
    return sample


def _debug() -> ConfigDict:
    """For looking into a run; all slow it down."""
    debug = ConfigDict()
    debug.nans = False  # stop at the first operation that gives a NaN
    debug.log_compiles = False  # say what is compiled, and when
    debug.profile_steps = 0  # steps to trace for XProf, into WORKDIR/plugins/profile
    debug.profile_start = 10  # steps to let pass before
    return debug


def _evaluation() -> ConfigDict:
    """How samples are judged."""
    evaluation = ConfigDict()
    # none; small_images (of few pixels: a support-vector classifier, and a Frechet distance of raw
    # pixels); spoken_digits (a speech recogniser; pip install djepa_jax[evaluation]); moving_digits
    # (of clips: the digit, and how it moves); captions (are pictures told by theirs: docs/text.md);
    # speech (a recogniser hears the words); say_and_draw (of pairs: is it the same digit?); or a
    # network whose features of pictures or spectrograms are compared: classifier (learns the data's
    # own classes), efficientnet_lite0 (of ImageNet; the same extra), inception (FID), dinov2.
    # Several are joined by +. auto: classifier for pictures of two classes or more, else none
    evaluation.kind = "none"
    # none; or paper_no_cfg, paper_cfg, adm, trend: on the command line it sets kind and count, and
    # how samples are drawn (config/presets.py); keys beside it on the command line win
    evaluation.preset = "none"
    evaluation.weights = ""  # the file of inception's or dinov2's weights
    # statistics to judge by in place of those of the data: what --mode=reference or ADM wrote (npz)
    evaluation.reference = ""
    evaluation.reference_count = 0  # class-balanced pictures of --mode=reference; 0 = all
    # npz file of other pictures with captions, from which the judge captions learns; "": the data
    evaluation.captions = ""
    evaluation.count = 1000  # class-balanced samples
    evaluation.trend_count = 1000  # of them every evaluate_every steps, if those are fewer
    evaluation.seed = 1  # other noise than the sample grids
    return evaluation


def _search() -> ConfigDict:
    """What --mode=search tries; `evaluation` says how it is judged."""
    search = ConfigDict()
    search.preset = (
        "grid"  # or acceleration, a list of ways that cost less, of `count` samples each
    )
    # Values of the keys of `sample` that are so called, every combination; empty: the one there
    search.cfg_scale = (1.0, 1.5, 2.0, 3.0, 4.0)
    search.temperature = (0.94, 0.97, 1.0)
    search.num_ar_steps = ()
    search.num_denoise_steps = ()
    search.sampler = ()
    search.cfg_denoise_start = ()
    search.guide_scale = ()
    search.count = 1000  # class-balanced samples of each combination
    search.fine_count = 5000  # of the best ones, and of some halfway to their neighbours
    search.fine_cells = 5  # that are the best, by distance and by score; 0 = no second pass
    return search
