from xmoe_fairseq.moe.native.build import main

main()
