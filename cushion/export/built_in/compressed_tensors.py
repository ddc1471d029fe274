"""The target `compressed-tensors`: the run's quantized model, with its prefix beside it, as transformers loads it.

## `compressed-tensors`: the quantized model

The model of the run's own row, the last one of its table, in the format of
[compressed-tensors](https://github.com/vllm-project/compressed-tensors), with the prefix beside it:

```bash
pip install -e ".[export]"   # in the clone; `make` has done it
cushion quantizer=int8_static search=greedy_pruned tuning=short tracking=none
cushion-export outputs/default/.../0123456789ab --to compressed-tensors my_model
lm_eval --model hf --model_args pretrained=my_model,dtype=float32,peft=my_model/prefix --tasks wikitext
```

| file | |
|---|---|
| `config.json`, weights in safetensors, tokenizer | what `AutoModelForCausalLM.from_pretrained(DIR, dtype="float32")` loads (`"bfloat16"` for formats of blocks): codes and scales of the linears, all else in float32; smoothing and rotation are folded into the weights |
| `prefix/` | the prefix as an adapter, as `--to peft` writes it: `PeftModel.from_pretrained(model, "DIR/prefix")`; its base is `DIR` itself, so `--base-model` is not needed. Not there without a prefix |
| `README.md` | model card: what it is, how it was made, the run's rows, how far it agrees with the simulation, the command that checks it |

Cushion is not needed to load it, only transformers, compressed-tensors and, for the prefix, PEFT. transformers runs
it as fake quantization: a reference and a format, not a speed-up.

- The export fits the run's quantizer again, from its configuration, its files and its cached steps. A model or a
  calibration text that has changed is refused. Give the command in the folder in which the run was started, so that
  relative paths mean the same.
- Before `DIR` appears the checkpoint is loaded with transformers and runs beside the simulation, behind the prefix,
  on the first 8 blocks of the evaluation text. The largest difference of a logit and both perplexities stand in the
  card. Where the table says "equal" and a logit differs at all, nothing is written.
- On tiny models of all families but mixtures of experts, smoothed or not, and on SmolLM2 the static schemes give the
  very logits of the simulation. SmolLM2 behind a prefix that was tuned for 60 steps, with `int8_static`,
  `smoothquant_o3`, `rotation` and the last two together, was loaded where transformers, compressed-tensors and PEFT are
  and Cushion is not: the logits of 8 blocks of 512 tokens differ by 0.0, and the perplexities (24.30, 24.30, 23.15,
  23.40) are those of the runs' tables. So it was with MSE and with learned ranges, where stock `lm_eval` with `peft=` also
  gave the run's accuracy on 60 records of LAMBADA, and with `fp8_static` and a static FP8 cache per head. Nothing but
  transformers was tried: a server may compute scales of its own, or have no kernel for a scheme.
- The scales hold behind the prefix as keys and values. To put the tokens themselves before a prompt, the inputs of a
  few linears must stay in full precision: `--to tokens` finds and lists them
  ([below](#tokens-the-prefix-for-servers)).
- In families whose linears read no norm (OLMo 2) query, key and value may have input scales of their own, where these
  are learned or searched by outputs, and NVFP4 its tensor scales; servers take one for all.

### What maps to what

| quantizer | weights, inputs | loaded logits |
|---|---|---|
| integer weights per tensor, channel or group; static inputs per tensor, `quantizer.activations.narrow_range=false` | `tensor`, `channel`, `group`; `tensor` | equal |
| FP8 E4M3 weights per tensor, channel or group; static inputs per tensor | `channel`, `group`, `float`; `tensor` (a scale for the tensor is written once per channel: servers would round fused layers anew) | equal |
| FP8 E4M3, dynamic inputs per token or tensor | the same; `token`, `tensor` dynamic (vLLM: per token) | equal |
| weights alone (`quantizer.activations.bits=null`) | a scale for the tensor is written once per channel | equal |
| linears that QFeM keeps | a second group of weights alone, by full name | equal |
| integers, dynamic inputs per token or tensor | `token`, `tensor` dynamic | differ: the file has no scales, transformers computes them as abs-max / 127.5, the run and vLLM as abs-max / 127 |
| asymmetric integer inputs, `quantizer.zero_point=integer` | `symmetric: false` | differ in the last bit of a linear: (code - zero) scale against code scale + offset |
| NVFP4 (static inputs), MXFP4, MXFP6, MXFP8; weights alone too | `tensor_group` of 16, `group` of 32 | differ: transformers takes these weights out of the file in bfloat16, so the model is loaded in bfloat16 and runs in it; the run was in float32. NVFP4 has its tensor scale as a factor, which rounds differently |
| a cache in static symmetric FP8, per tensor or per head | `kv_cache_scheme`, `k_scale` and `v_scale` of each attention | equal with `attn_implementation="eager"`, as the card says; other kernels sum in another order |

Those that differ do so by nothing else: with that arithmetic in the simulation, or with the model kept in float32,
the logits are equal (MX: with the default of `quantizer.shared_exponent`). How ranges and codes were found (`minmax`,
`mse`, `gptq`, learned, reconstructed) makes no difference. Weights of 4 bits, and weights alone, are packed.

| options of `quantizer` | loaded logits |
|---|---|
| `int8_static`, `fp8_static`, `fp8_token`, `awq`, `w4a16_gptq`, `w4a16_rtn`, `omniquant_w4a16` | equal |
| `per_tensor_static`, `mse_static`, `mse_static_channel`, `w6a6_mse_static`, `smoothquant_o3`, `smoothquant_auto`, `rotation`, `qfem_static`, `w8a8_group` | equal with `quantizer.activations.narrow_range=false` |
| `int8_token`, `per_tensor_dynamic`, `per_token_dynamic`, `smoothquant_o1`, `smoothquant_o2`, `qfem`, `qfep`, `qfem_qfep`, `w6a6`, `w4a8`, `w4a8_gptq`, `w4a4` | differ |
| `cushioncache_dynamic`, `cushioncache_static`, `cushioncache_token`, `cushioncache_o1`, `cushioncache_o2`, `cushioncache_o3` | differ |
| `nvfp4`, `nvfp4_w4a16`, `mxfp4`, `mxfp6`, `mxfp8` | differ |
| `aser`, `l2qer`, `lqer` | refused: a low-rank branch stands beside the codes |
| `mse_static_rotated`, `w4a8_gptq_static`, `quarot`, `quarot_adaptive`, `quarot_rtn`, `prefixquant`, `prefixquant_w4a8`, `prefixquant_dynamic` | refused: they rotate inputs or heads while the model runs |
| `kivi`, `omniquant`, `omniquant_w6a6` | refused: their caches are not static FP8 |
| `rptq` | refused: its inputs have several scales |
| `os_plus` | refused: a shift is taken from norms' outputs while the model runs |

Refused, with the way out:

| what | why |
|---|---|
| `quantizer.activations.narrow_range=true` with static integer ranges | codes are clamped at -128, not at -127: run with `false` |
| `quantizer.activations.granularity=per_cluster` or `per_channel` | an input has one scale: `per_tensor` |
| `quantizer.activations.clip_ratio` below 1 | scales on the fly hold all values: 1 |
| `reconstruction.transforms=true` of OmniQuant | a division stands before each linear: `false` |
| `quantizer.smoothing_pairs=values` and `all` | the cache, and so a prefix, holds scaled values: `up` |
| `quantizer.zero_point=real` | an offset is a whole number of steps: `integer` |
| `quantizer.levels=paper` where it leaves codes unused, or for dynamic ranges | `full` |
| `quantizer.kv_cache` but for `range=static` with `granularity=per_tensor` or `per_head`, `format=fp8_e4m3`, `symmetric=true`, `protect=0` | of caches that alone is written |
| `quantizer.attention`, `quantizer.input_rotation`, `quantizer.compensation`, parts of plugins | they are in no plain checkpoint of this format |
| `quantizer.weights.bits=null`; `fp8_e5m2`; two formats of which one has blocks | there is no such scheme |
| `quantizer.activations.range=dynamic` of NVFP4 | the scale of a whole input is in the file: `static` |
| `quantizer.rotation` on OPT, BLOOM, GPT-NeoX, Falcon, Gemma 2 and 3 | their norms do not commute with it, and what stands for them is not in transformers |
| mixtures of experts | transformers keeps the weights of experts in fused tensors |
| `model.dtype` other than float32 | scales are loaded in the model's precision, and rounded |
"""  # noqa: E501

from __future__ import annotations

from importlib.util import find_spec

from cushion.errors import ConfigError
from cushion.export.finished import FinishedRun
from cushion.export.targets import ExportTarget, register


def _check(run: FinishedRun) -> None:
    from cushion.export.schemes import TARGET, check_run  # not needed for --help

    check_run(run)
    if find_spec("compressed_tensors") is None:
        raise ConfigError(f"--to={TARGET} needs the package compressed-tensors: pip install compressed-tensors")


register(
    ExportTarget(
        name="compressed-tensors",
        title="the quantized model as a checkpoint that transformers loads, with the prefix as an adapter beside it",
        check=_check,
        write="cushion.export.checkpoint:write",
    )
)
