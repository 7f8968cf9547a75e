"""The decoder: Multi-head Latent Attention and DeepSeekMoE, as Flax NNX modules.

Read in this order: layers, attention, moe, layer, layer_loop, decoder; the kernels that they call are in `kernels/`.
One legend of axis letters holds for all shapes, in annotations and comments (#B is B or 1); `kernels/` adds its own:

    B batch        T time (queries)   S time (keys, cache slots)   N = B*T tokens
    D hidden       H heads            h = n + r query head (n without position, r rotary)    v value head
    R latent       Q query latent     G rotary keys of a token (H, or 1 for all heads)
    F expert hidden                   E routed experts             k experts of a token   M = N*k rows
    I, O in and out of a linear map
    L layers       V vocabulary       A micro-batches of a step
"""
