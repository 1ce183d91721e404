"""One change each to the paper's 340M run, or to that of another recipe named after a colon.

python train.py --config=configs/ablations/no_rope.py:sharp --workdir=DIR
"""
