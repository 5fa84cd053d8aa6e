#!/usr/bin/env bash
# Make the latents of ImageNet for training: the KL autoencoder's, of the archives of ILSVRC 2012, which are read where
# they lie.
#
#   bash launch/prepare_imagenet.sh --tars=DIR --cache_dir=DIR --config.autoencoder.path=FILE [--platform=cuda]
#       [--publish=gs://BUCKET/CACHE] [--config=configs/djepa_l.py] [--dry_run] [--config.KEY=VALUE ...]
#       [-- more flags for djepa_jax.main]
#   bash launch/prepare_imagenet.sh --tars=/data/tars --cache_dir=/data/latents --platform=cuda \
#       --config.autoencoder.path=kl16.ckpt
#
# --tars holds ILSVRC2012_img_train.tar, which image-net.org gives after registration; nothing is downloaded here.
# --platform is what encodes: cpu, cuda or tpu; a CPU (the default) takes very long. Run the same command again after an
# interruption. Started by srun, each process makes its share. --publish copies the finished cache to a bucket, from where
# TPUs take it.
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

tars="" data_dir="" cache_dir="" publish="" config=configs/djepa_l.py platform=cpu dry_run=""
parse_flags "tars data_dir cache_dir publish config platform" "dry_run" "$@"
require tars cache_dir
[ -z "$data_dir" ] || echo "note: --data_dir is no longer needed; the archives are read where they lie" >&2
if [ -n "$publish" ]; then
  [[ $publish == gs://?* ]] || die "--publish=$publish: give a bucket, gs://BUCKET/CACHE"
  [ -z "${SLURM_STEP_NODELIST:-}" ] || die "--publish: run this once more, without srun, when all shares are made"
  [ -n "$dry_run" ] || command -v gcloud >/dev/null 2>&1 ||
    die "no gcloud here for --publish; install the Google Cloud CLI and log in"
fi
[ -z "${SLURM_STEP_NODELIST:-}" ] || is_prepared "$platform" || die "first, once: bash launch/setup.sh $platform"
[ -z "${SLURM_STEP_NODELIST:-}" ] || extra+=("--shard=$SLURM_PROCID/$SLURM_NTASKS")

prepare "$platform"
encode=("$PYTHON" -m djepa_jax.main --mode=prepare "--config=$config" "--workdir=$cache_dir"
  --config.prepare.source=ilsvrc "--config.prepare.path=$tars" ${extra[@]+"${extra[@]}"})
if [ -z "$publish" ]; then
  run_last "${encode[@]}"
else # the metadata last: a cache that has it is whole
  run "${encode[@]}"
  run gcloud storage rsync --recursive '--exclude=^metadata\.json$|^\.lock' "$cache_dir" "${publish%/}"
  run gcloud storage cp "$cache_dir/metadata.json" "${publish%/}/metadata.json"
fi
