"""Exact rewrites: each module computes what the published one computes, in fewer or cheaper operations.

Every rewrite is one small class: what it matches, why it may refuse, and the module it puts there.
"""
