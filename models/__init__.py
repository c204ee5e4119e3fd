"""The mathematics, on one device: the decoder, its initial weights, its FLOPs and its exchange with Hugging Face.

Nothing here imports torch.distributed, reads the environment or knows of ranks; parallel/ arranges these modules over
a mesh without changing them. Shapes stand in the signatures, in these words: batch seq dim heads kv_heads head_dim ffn
vocab; `rows` is batch or 1.
"""
