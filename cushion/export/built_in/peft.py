"""The target `peft`: the run's prefix as an adapter that stock PEFT puts before every text.

## `peft`: the prefix as an adapter

The run's final prefix, found or tuned, as an adapter of [PEFT](https://huggingface.co/docs/peft) of the kind
`PREFIX_TUNING`:

| file | |
|---|---|
| `adapter_config.json` | kind, shapes, base model and its revision |
| `adapter_model.safetensors` | one matrix `prompt_embeddings`, (positions, layers x 2 x key-value heads x head size), in float32: for each position the key then the value of each layer, head by head |
| `README.md` | model card: what it is, how it was made, the run's rows, the command that checks it |

PEFT is not needed to write them. It puts the keys and values into the cache as they are, which is what Cushion does:

```bash
lm_eval --model hf --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,dtype=float32,peft=my_adapter --tasks wikitext
```

On tiny models of all families and variants, loaded where Cushion is not installed, logits differ from Cushion's by at
most 1e-6, and a batch of four that is padded on the left gives the same tokens, greedily and with two beams.

- The adapter holds the prefix alone. It does not quantize; on the model as it is it gives the run's row in full
  precision with that prefix. On a model that other software quantizes, the prefix's own positions never run through a
  quantized linear.
- A plain forward pass of a batch padded on the left needs `position_ids` that start behind the prefix; `generate`
  counts them by itself.
- Layers with a sliding window see the prefix only from as far as the window reaches, as they do in a run.
- Keys and values have one shape in all layers; a model where they differ is refused.
- It is loaded with PEFT: `PeftModel.from_pretrained(model, DIR)` or `AutoPeftModelForCausalLM.from_pretrained(DIR)`.
  The `load_adapter` of transformers' own models does not know adapters of this kind.
"""  # noqa: E501

from __future__ import annotations

from cushion.export.finished import FinishedRun
from cushion.export.targets import ExportTarget, register


def _check(run: FinishedRun) -> None:
    run.require_prefix()
    run.base_model()


register(
    ExportTarget(
        name="peft",
        title="the prefix as a PEFT adapter (PREFIX_TUNING)",
        check=_check,
        write="cushion.export.peft_adapter:write",
    )
)
