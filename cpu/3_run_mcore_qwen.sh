#!/usr/bin/env bash
# Step 3 on a CPU: train Qwen2.5, or turn a distributed checkpoint into torch format.
# 第 3 步（CPU）：训练 Qwen2.5，或把分布式检查点转换为 torch 格式。
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# Needed / 必填
: "${DATASET_PATH:=}"         # OUTPUT_PREFIX of step 1, or by weight: 0.7 a 0.3 b / 第 1 步的 OUTPUT_PREFIX，或按权重混合
: "${LOAD_CHECKPOINT_PATH:=}" # weights to start from: step 2's or a run's / 起始权重：第 2 步或某次训练的目录
: "${SAVE_CHECKPOINT_PATH:=}" # folder for checkpoints; the same folder resumes / 检查点目录；再次运行即续训

# What to do / 任务
: "${TRAIN_OR_CONVERT_CKPT:=train}" # train, or convert: newest checkpoint to torch format / 训练或转换
: "${TRAIN_MODE:=pretrain}"         # pretrain: all tokens; finetune: answers; dpo: chosen over rejected answers / 预训练、微调或偏好
: "${IS_INITIAL_RUN:=auto}"         # auto resumes if it can; true: weights only; false: resume / 首次运行
: "${HF_MODEL_PATH:=}"              # instead of LOAD_CHECKPOINT_PATH: random weights / 随机初始化时的模型目录

# What is trained / 训练哪些参数
: "${TUNER:=full}"    # full: all weights; lora: adapters on the weights of LOAD_CHECKPOINT_PATH / 全部参数，或 LoRA
: "${TRAINABLE:=}"    # train these weights alone: patterns over Hugging Face's names / 只训练匹配的参数
: "${FREEZE:=}"       # train all but these, as "model.embed_tokens.* lm_head.*" / 冻结匹配的参数
: "${LORA_RANK:=}"    # rank of the adapters; empty: 16 / 秩；空：16
: "${LORA_ALPHA:=}"   # their output is scaled by alpha / rank; empty: twice the rank / 缩放系数；空：秩的两倍
: "${LORA_DROPOUT:=}" # dropout of their input; empty: 0 / 输入的 dropout；空：0
: "${LORA_TARGETS:=}" # modules, as q_proj,v_proj; empty: all-linear / 目标模块，如 q_proj,v_proj；空：all-linear
: "${LORA_ADAPTER:=}" # PEFT folder of an adapter to start from / 起始的 PEFT 适配器目录

# Data / 数据
: "${SPLIT:=98,2,0}"          # shares for training, validation and nothing / 训练、验证、不用的比例
: "${VALID_DATASET_PATH:=}"   # instead of SPLIT: one set, or several by name: law a general b / 代替 SPLIT：一个，或按名称多个
: "${SEQ_LENGTH:=2048}"       # tokens in a sample / 样本长度
: "${TRUNCATE:=error}"        # samples over SEQ_LENGTH: error, drop, left or right / 超长样本
: "${PACKING:=auto}"          # finetune, dpo: several samples in one row; auto: if the layers can / 微调、偏好：多个样本拼成一行；auto：支持时
: "${RESET_ATTENTION:=false}" # pretrain: documents in a sample stay apart / 预训练：同一样本内文档互不可见

# Preferences (TRAIN_MODE=dpo) / 偏好训练
: "${DPO_LOSS:=sigmoid}"        # sigmoid (DPO), ipo, or orpo, which needs no reference / 损失；orpo 不需要参考模型
: "${DPO_BETA:=0.1}"            # beta of DPO and IPO, lambda of ORPO / DPO、IPO 的 beta，ORPO 的 lambda
: "${DPO_LABEL_SMOOTHING:=0.0}" # sigmoid: share of pairs whose preference may be wrong / 偏好可能标反的比例
: "${DPO_SFT_WEIGHT:=0.0}"      # sigmoid, ipo: weight of the chosen answers' own loss / 被选回答自身损失的权重

# Parallelism / 并行
: "${TP:=1}"             # tensor parallel size; above 1, sequence parallel too / 张量并行，大于 1 时含序列并行
: "${PP:=1}"             # pipeline parallel size / 流水线并行
: "${VPP:=1}"            # virtual pipeline chunks per rank / 每个 rank 的虚拟流水线块数
: "${PIPELINE_LAYERS:=}" # layers of each stage, as 7,7,8,6; empty: even / 各阶段的层数，如 7,7,8,6；空：均分
: "${CP:=1}"             # context parallel size: GPUs that share a row / 上下文并行：分担一行的 GPU 数
: "${GPUS:=1}"           # processes on this node, in place of GPUs / 本节点进程数（代替 GPU）

# Nodes: run this script on each / 多节点：在每个节点上运行本脚本 (docs/multi-node.md)
: "${NNODES:=1}"                   # nodes / 节点数
: "${NODE_RANK:=0}"                # this node's number, from 0 / 本节点编号，从 0 开始
: "${MASTER_ADDR:=localhost}"      # node 0's address / 0 号节点地址
: "${MASTER_PORT:=}"               # a free port there; empty: any on one node, else 29500 / 空闲端口；空：单节点任取，多节点 29500
: "${RDZV_ENDPOINT:=}"             # host:port of the rendezvous, instead of these three / 会合地址，代替以上三项
: "${RDZV_ID:=kit}"                # the run's name at the rendezvous / 会合处的任务名
: "${MAX_RESTARTS:=0}"             # restarts from the newest checkpoint / 从最新检查点自动重启的次数
: "${DISTRIBUTED_TIMEOUT_MIN:=10}" # timeout of nodes and collectives, in minutes / 等待超时（分钟）
: "${HANG_TIMEOUT_MIN:=}"          # report a hanging rank after so many minutes; empty: 0.8 of it / 挂起检测（分钟），空：超时的 0.8

# Length of the run / 训练长度
: "${MICRO_BATCH_SIZE:=2}"   # samples a process runs at once / 每个进程一次计算的样本数
: "${GLOBAL_BATCH_SIZE:=16}" # samples of one step / 每步的样本总数
: "${EPOCHS:=}"              # passes over the data; 3 unless TRAIN_ITERS is set / 轮数；未设 TRAIN_ITERS 时为 3
: "${TRAIN_ITERS:=}"         # steps, instead of EPOCHS / 步数，代替 EPOCHS
: "${EXIT_INTERVAL:=}"       # save and stop at each multiple of it / 到该步数的倍数时保存并退出
: "${EXIT_DURATION_MIN:=}"   # save and stop after so many minutes / 运行这么多分钟后保存并退出
: "${SEED:=1234}"            # random weights and the order of samples / 随机种子

# Optimizer / 优化器
: "${PRECISION:=fp32}"                 # bf16 or fp32; master weights are fp32 / 计算精度；主权重为 fp32
: "${OPTIMIZER_STATE:=fp32}"           # fp32; bf16: half; cpu: in host memory; cpu_bf16: both / 优化器状态：bf16 减半；cpu 在主机内存；cpu_bf16 两者
: "${LR:=}"                            # highest learning rate; empty: 1e-5, dpo 1e-6, with LoRA ten times that / 最高学习率；空：1e-5，dpo 1e-6，LoRA 为十倍
: "${MIN_LR:=}"                        # learning rate at the end; empty: a tenth of LR / 最低学习率；空：LR 的十分之一
: "${LR_WARMUP_ITERS:=}"               # steps of warm-up, instead of the fraction / 预热步数，代替下一项
: "${LR_WARMUP_FRACTION:=}"            # fraction of the run; empty: finetune 0.03, pretrain 0.01, dpo 0.1 / 预热比例；空：微调 0.03，预训练 0.01，dpo 0.1
: "${LR_DECAY_STYLE:=cosine}"          # cosine, linear, constant, inverse-square-root or WSD / 学习率曲线
: "${LR_WSD_DECAY_ITERS:=}"            # WSD: the last so many steps, in which LR falls to MIN_LR / WSD：最后这么多步降到 MIN_LR
: "${LR_WSD_DECAY_STYLE:=exponential}" # WSD: exponential, linear, cosine or minus_sqrt / WSD 下降的曲线
: "${WEIGHT_DECAY:=0.1}"               # not on norms and biases / 权重衰减，不作用于 norm 和 bias
: "${ADAM_BETA1:=0.9}"                 # Adam / Adam 参数
: "${ADAM_BETA2:=0.95}"                # Adam / Adam 参数
: "${ADAM_EPS:=1e-8}"                  # Adam / Adam 参数
: "${CLIP_GRAD:=1.0}"                  # largest gradient norm / 梯度裁剪
: "${MAX_BAD_STEPS:=5}"                # stop after so many steps in a row that are not finite / 连续这么多步非有限值则停止
: "${SKIP_GRAD_NORM:=}"                # skip a step whose gradient norm is above it / 梯度范数超过此值则跳过该步

# Checkpoints, evaluation, log / 保存、验证、日志
: "${SAVE_INTERVAL:=100}"      # steps between checkpoints / 保存间隔（步）
: "${KEEP_CHECKPOINTS:=3}"     # newest ones kept; 0: all / 保留最新几个；0：全部
: "${KEEP_EVERY:=0}"           # also keep each multiple of it; 0: none / 另外保留该步数的倍数；0：不保留
: "${KEEP_BEST:=0}"            # also keep so many with the lowest validation loss / 另外保留验证损失最低的几个
: "${KEEP_EPOCHS:=false}"      # save at the end of each epoch, and keep it / 每轮结束时保存并保留
: "${SAVE_OPTIMIZER:=true}"    # false: weights only, cannot resume / false：只保存权重，不能续训
: "${EXPORT_HF:=none}"         # export for transformers beside training: none, best, last, each / 边训练边导出
: "${ASYNC_SAVE:=false}"       # write while training goes on (torch_dist) / 异步保存（torch_dist）
: "${CKPT_FORMAT:=torch_dist}" # torch_dist or torch / 检查点格式
: "${EVAL_INTERVAL:=100}"      # steps between evaluations; 0: none / 验证间隔（步）；0：不验证
: "${EVAL_ITERS:=50}"          # global batches of one evaluation; sets with names: all / 每次验证的批数；命名的验证集总是全部
: "${LOG_INTERVAL:=10}"        # steps between log lines / 日志间隔（步）
: "${MAX_FIRST_LOSS:=}"        # stop if the first loss is above it / 首步损失高于此值则停止

# Memory and kernels / 显存与算子
: "${RECOMPUTE:=none}"            # none, selective or full / 激活重计算
: "${RECOMPUTE_NUM_LAYERS:=}"     # with full: only the first so many layers of a stage / full 时每阶段只重计算前几层
: "${FP8_FORMAT:=none}"           # none, hybrid or e4m3: FP8 matrix products (Transformer Engine, Hopper) / FP8 矩阵乘
: "${FP8_RECIPE:=tensorwise}"     # tensorwise, delayed or blockwise / FP8 缩放方式
: "${TP_COMM_OVERLAP:=auto}"      # TP communication beside matrix products; auto: by copies between GPUs, true: Transformer Engine's / 张量并行通信与矩阵乘重叠：auto 由 GPU 间复制，true 由 TE
: "${TRANSFORMER_IMPL:=local}"    # transformer_engine or local / 层的实现
: "${OVERLAP_GRAD_REDUCE:=true}"  # reduce gradients during the backward pass (DP x CP above 1) / 反向计算时归约梯度
: "${OVERLAP_PARAM_GATHER:=true}" # gather weights during the forward pass (DP x CP above 1) / 前向计算时收集权重
: "${DETERMINISTIC:=false}"       # the same bits on the same GPUs, slower / 同样的 GPU 得到逐位相同的结果，较慢

# Looking inside a step / 查看一步的内部 (docs/log.md)
: "${PROFILE:=}"              # steps to trace with torch.profiler, as 10-12 / 用 torch.profiler 记录这些步，如 10-12
: "${PROFILE_RANKS:=0}"       # ranks that are traced, as 0,8, or all / 记录哪些 rank，如 0,8 或 all
: "${MEMORY_SNAPSHOT:=false}" # what holds the GPU's memory, after these steps or the first 3, and when it runs out / 显存快照：上述步或前 3 步之后，以及显存不足时

# TensorBoard; Weights & Biases and SwanLab, off without a project / 未设 PROJECT 时后两者关闭
: "${TENSORBOARD:=auto}"    # event files in SAVE_CHECKPOINT_PATH/tensorboard: true, false or auto / 事件文件
: "${WANDB_PROJECT:=}"      # project / 项目
: "${WANDB_EXP_NAME:=}"     # the run's name / 实验名
: "${WANDB_MODE:=online}"   # online, offline or disabled / 模式
: "${WANDB_SAVE_PATH:=}"    # folder of its files / 本地目录
: "${SWANLAB_PROJECT:=}"    # project / 项目
: "${SWANLAB_EXP_NAME:=}"   # the run's name / 实验名
: "${SWANLAB_MODE:=online}" # online, local, offline or disabled / 模式
: "${SWANLAB_SAVE_PATH:=}"  # folder of its files / 本地目录

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/train.sh
source "$VENDOR/../common/shell/train.sh" "$@"
