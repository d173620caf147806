"""Several ranks: the only code that knows how many processes a run has.

`launch` is what torchrun says (no torch), `ranks` what the processes tell each other, `sharding` FSDP2.
"""
