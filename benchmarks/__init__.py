"""How fast, how large and how accurate funcmha is, beside other libraries: `python -m benchmarks --help`.

__main__.py   the command line             cases.py      what is computed, and how much work it is
peers/        who computes it, one file per library; a peer says for itself what it cannot do
worker.py     one peer in one process      processes.py  the other end of its pipe
timing.py     how fast?                    memory.py     how large?
accuracy.py   how far from float64?        scaling.py    how do time and memory grow with the length?
table.py      tables of plain text         machine.py    what it ran on
"""
