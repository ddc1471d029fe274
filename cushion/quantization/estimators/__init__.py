"""Range estimators of static activations: what each needs, and how a range follows from it.

## Static ranges

`activations.estimator`. x are all values of a linear's input, over all calibration tokens behind the row's prefix; q is
the grid that a range gives.

- `minmax`: min x to max x.
- `percentile`, P = 99.99: symmetric, -t to t with the smallest t for which P % of abs(x) are at most t; asymmetric,
  (100 - P) / 2 % of x lie beyond either end. Never wider than `minmax`.
- `mse`: the least mean of (x - q(x))^2, of ranges down to 1 / 250 (asymmetric: 1 / 215) of `minmax`, the last ones
  0.5 % apart. Symmetric ranges shrink towards 0; the ends of asymmetric ones shrink each by itself, towards the median.
- `entropy`: -t to t with the least KL(p, q). p are the counts of abs(x) in bins of equal width up to t, of 2048 up to
  the largest, what lies beyond t added to the last; q the same bins as means of 2^(N-1) groups. TensorRT's calibration
  (Migacz, GTC 2017).
- `moving_average`, a = 0.01: r + a (r_i - r), r_i being min and max of text i; the first r is that of the first text
  (arXiv [1712.05877](https://arxiv.org/abs/1712.05877), section 3.1).
- [`block_output`](method.md#ranges-by-block-output): the factor on `minmax` with the least error of the block's output.

`percentile`, `mse` and `entropy` read a histogram that has 256 bins for each octave.
"""
