#!/usr/bin/env bash
# Make the latents of ImageNet for training from the two archives of ILSVRC 2012: unpack and check the pictures into
# --data_dir, then encode them into --cache_dir.
#
#   bash launch/prepare_imagenet.sh --tars=DIR --data_dir=DIR --cache_dir=DIR [--platform=cuda] [--skip_size_check]
#       [--publish=gs://BUCKET/CACHE] [--config=configs/djepa_l.py] [--dry_run] [--config.KEY=VALUE ...] [-- more flags for djepa_jax.main]
#   bash launch/prepare_imagenet.sh --tars=/data/tars --data_dir=/data/imagenet --cache_dir=/data/latents --platform=cuda
#
# --tars holds ILSVRC2012_img_train.tar (147,897,477,120 bytes) and ILSVRC2012_img_val.tar (6,744,924,160 bytes), which
# image-net.org gives after registration; nothing is downloaded here. --platform is what encodes: cpu, cuda or tpu; a CPU
# (the default) takes very long. --publish copies the finished cache to a bucket, from where TPUs take it; run the same
# command again after an interruption.
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# check_archive NAME BYTES: an absent one is noted in `missing`.
check_archive() {
  local path="$tars/$1" size
  if [ ! -f "$path" ]; then
    missing="${missing:+$missing and }$1"
  elif [ -z "$skip_size_check" ]; then
    size=$(($(wc -c <"$path")))
    [ "$size" = "$2" ] || die "$path has $size bytes and not $2: the download is incomplete (--skip_size_check takes it as it is)"
  fi
}

tars="" data_dir="" cache_dir="" publish="" config=configs/djepa_l.py platform=cpu skip_size_check="" dry_run=""
parse_flags "tars data_dir cache_dir publish config platform" "skip_size_check dry_run" "$@"
require tars data_dir cache_dir
case $platform in cpu | cuda | tpu) ;; *) die "--platform=$platform: use cpu, cuda or tpu" ;; esac
case $publish in "" | gs://?*) ;; *) die "--publish=$publish: give a bucket, gs://BUCKET/CACHE" ;; esac
publish=${publish%/}
check_config "$config"

if [ -z "$dry_run" ]; then
  [ -z "$publish" ] || command -v gcloud >/dev/null 2>&1 || die "no gcloud here for --publish; install the Google Cloud CLI and log in"
  missing=""
  check_archive ILSVRC2012_img_train.tar 147897477120
  check_archive ILSVRC2012_img_val.tar 6744924160
  [ -z "$missing" ] || die "not in $tars: $missing; image-net.org gives both archives (ILSVRC 2012, tasks 1 and 2) after registration"
fi
prepare "$platform" prepare
run "$PYTHON" -m djepa_jax.data.ilsvrc "--tars=$tars" "--data_dir=$data_dir"
encode=("$PYTHON" -m djepa_jax.main --mode=prepare "--config=$config" "--workdir=$cache_dir"
  --config.prepare.source=tfds "--config.prepare.path=imagenet2012@$data_dir" ${extra[@]+"${extra[@]}"})
if [ -z "$publish" ]; then
  run_last "${encode[@]}"
else
  run "${encode[@]}"
  # The metadata last: a cache that has it is whole.
  run gcloud storage rsync --recursive '--exclude=^metadata\.json$|^\.lock' "$cache_dir" "$publish"
  run_last gcloud storage cp "$cache_dir/metadata.json" "$publish/metadata.json"
fi
