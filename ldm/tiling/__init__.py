"""Encode and decode images of any size with bounded memory.

`decode.decode_rows` and `encode.encode` are what others call; `config.Tiling` says how.
"""
