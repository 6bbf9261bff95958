#!/usr/bin/env bash
# Bring the peers to a GPU machine without network: wheels of what it lacks, unpacked and packed into one archive.
#
#   bench/carry.sh [FOLDER]                                   here, with network: FOLDER/site.tar.gz (default: .whl)
#   mkdir -p /tmp/site && tar -xzf .whl/site.tar.gz -C /tmp/site && export PYTHONPATH=/tmp/site:src:.        there
#
# For Python 3.12 on x86-64 with torch 2.11 and CUDA 13.0, whose machine has transformers 5.17, peft and accelerate.
# Unsloth takes trl up to 1.15 and datasets below 5. Left out: xformers, whose wheel on PyPI (0.0.35) is linked against
# CUDA 12 and does not load beside torch 2.11 for CUDA 13, so Unsloth uses torch's attention; and flash-attn, which has
# no wheel on PyPI.
set -euo pipefail
folder=$(realpath -m "${1:-.whl}")
site=$folder/site wheels=$folder/wheels
rm -rf "$site" && mkdir -p "$site" "$wheels"

packages=(
  bitsandbytes==0.50.2 liger-kernel==0.8.5 trl==1.15.0 unsloth==2026.10.9 unsloth_zoo==2026.10.9
  datasets==4.8.5 dill==0.4.1 multiprocess==0.70.19 pydantic==2.14.3 pydantic_core==2.50.4 annotated_types==0.8.0
  typing_inspection==0.4.5 torchao==0.18.0 diffusers==0.42.1 importlib_metadata==9.0.1 cut_cross_entropy==25.1.1
  hf_transfer==0.1.9 msgspec==0.22.0 tyro==1.0.17 docstring_parser==0.18.0 typeguard==4.6.0 nest_asyncio==1.6.0
  structlog==26.1.0 json5==0.17.3
)
platforms=()
for tag in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do platforms+=(--platform "${tag}_x86_64"); done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --abi cp312 --abi abi3 --abi none "${platforms[@]}" --dest "$wheels" "${packages[@]}"
for wheel in "$wheels"/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done

rm -rf "$site/studio" "$site/unsloth/studio" "$site/test" "$site"/*.data
find "$site/bitsandbytes" -name '*.so' ! -name '*_cpu.so' ! -name '*_cuda130.so' -delete
tar -czf "$folder/site.tar.gz" -C "$site" .
megabytes=$(($(stat -c %s "$folder/site.tar.gz") / 1000000))
echo "$folder/site.tar.gz: $megabytes MB, ${#packages[@]} packages"
[ "$megabytes" -lt 60 ] || { echo "more than 60 MB: too large to carry"; exit 1; }
