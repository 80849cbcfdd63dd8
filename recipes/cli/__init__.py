"""What every command needs: reading arguments, checking the launch, recording the run, one-line errors.

The bottom floor: it may import no other room of `recipes`.
"""
