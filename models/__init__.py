"""The mathematics, on one device: the decoder, what adapters put beside it, quantised weights, initial weights, FLOPs,
and the exchange with Hugging Face and PEFT.

Nothing here imports torch.distributed, reads the environment or knows of ranks; parallel/ arranges these modules over
a mesh without changing them. Shapes stand in the signatures, in these words: batch seq dim heads kv_heads head_dim ffn
vocab; `rows` is batch or 1.
"""
