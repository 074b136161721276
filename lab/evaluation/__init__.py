"""Evidence: how often a model is right, where its sparse prefill loses what, and how sure that is.

It runs in process, without Ray and without HTTP; `longreach eval` adds endpoints.
"""
