from benchmarks.recompute.run import main

main()
