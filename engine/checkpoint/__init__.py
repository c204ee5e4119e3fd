"""Saved state: written in the background, committed by one rename, proved before it is loaded, on any layout.

checkpointer.py is what a run uses, reader.py what tools use without any process group. Below them: manifest.py (what
makes a folder a checkpoint), storage.py (DCP's safetensors storage with a manifest), state.py (names, copies, load
targets) and ranks.py (agreeing on a verdict). docs/checkpoints.md has the format and the protocol.
"""
