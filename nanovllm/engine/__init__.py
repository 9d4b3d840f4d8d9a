"""The engine: who runs next, where its KV cache lives, and how one step is made."""
