"""Where tensors come from and go to.

places/ has files, formats/ what their bytes mean, sources/ tensors that are computed
while they are read, naming/ one set of names for several checkpoints, output/ what is
written, record/ what an output says of itself. `folder` opens a checkpoint, whatever it
is.
"""
