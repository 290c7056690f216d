"""Speed, memory and accuracy of funcmha and other libraries: `python -m benchmarks --help`.

__main__.py   the command line             cases.py      the problems, and their number of operations
peers/        the competitors, one file per library; each declares what it cannot do
worker.py     one peer in one process      processes.py  the other end of its pipe
timing.py     how fast?                    memory.py     how large?
accuracy.py   how far from float64?        scaling.py    how do time and memory grow with the length?
blocks.py     batched attention in one block and in many, by length: `python -m benchmarks.blocks`
table.py      plain-text tables            machine.py    the machine and the versions
"""
