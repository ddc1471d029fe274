"""Number formats of quantized values, by name.

## Number formats

`format` of weights, activations, `kv_cache`, `attention` and the search says what the codes are. A number with e
exponent bits, m mantissa bits and largest value T is rounded to the nearest, ties to even, subnormal numbers
included, and what lies beyond T becomes T: the saturating conversion of the OCP specifications.

| format | numbers | scale |
|---|---|---|
| `fp8_e4m3`, `fp8_e5m2` | E4M3 (T = 448), E5M2 (T = 57344); OCP 8-bit Floating Point 1.0 | max(abs X) / T in float32, per tensor, channel, group, token or head |
| `mxfp8`, `mxfp6`, `mxfp4` | E4M3, E2M3 (T = 7.5), E2M1 (T = 6); OCP Microscaling 1.0 | 2^k for every 32 neighbours, k from -127 to 127 |
| `nvfp4` | E2M1 (T = 6) | b t for every 16 neighbours: b an E4M3 number, t in float32 for the tensor |

With max(abs block) = f 2^E, 1 <= f < 2, and emax the exponent of T, `quantizer.shared_exponent` gives k of MX:

| rule | k | |
|---|---|---|
| `floor` | E - emax | the conversion that the specification recommends (section 6.3); values above T are clipped |
| `even` | E - emax, and 1 more from f = 2 - 2^(-m-1) on | default of `mxfp6` and `mxfp4` |
| `ceil` | E - emax, and 1 more for f > 1 | |
| `rceil` | ceil(log2(max(abs block) / T)) | default of `mxfp8`; the smallest scale that clips nothing |

NVFP4: t = max(abs X) / (448 * 6) and b = E4M3(max(abs block) / 6 / t), at most 448. t is that of an
input, dynamic over the whole batch or from its static range, or of the weights that servers compute as one: query, key
and value, or gate and up of one expert, where they read a norm; all other weights have their own. The choice of rotated
sites judges each weight by its own.

- Blocks lie along the inputs of a linear, and must divide them; in the cache along a head's channels, in attention
  along the dimension that a product sums over. The positions of a prefix are in no block.
- Tests compare FP8 with torch's casts, MX and NVFP4's scales with torchao where that is installed (no extra has it), and
  E4M3, MX and NVFP4 with compressed-tensors, bit for bit (values of NVFP4 to 5e-6). compressed-tensors takes the
  next scale of MXFP8 at f = 1.75 already, where torchao, as `rceil`, still has the smaller one.
- Not as specified: in an MX block with something that is not a number the other values stay numbers. A block scale of
  NVFP4 that would be 0 is 2^-9. What rounds to 0 has no sign. MX's E5M2 and E3M2 are left out.
"""  # noqa: E501
