"""Every text of the web page, in English and Chinese, and the examples."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

WORDS: dict[str, dict[str, str]] = {
    "en": {
        "intro": (
            "An instruction-following model. Each question is answered on its own: dolly remembers nothing of the one "
            "before."
        ),
        "language": "Language",
        "instruction": "Instruction",
        "instruction_hint": "A question or a task. Shift+Enter asks.",
        "context": "Context",
        "context_hint": "Optional: a text that the instruction is about.",
        "ask": "Ask",
        "stop": "Stop",
        "clear": "Clear",
        "answer": "Answer",
        "examples": "Examples, one of each kind that dolly was trained on",
        "settings": "Settings",
        "max_new_tokens": "Longest answer, in tokens",
        "max_new_tokens_info": "A token is about three quarters of an English word.",
        "do_sample": "Draw at random",
        "do_sample_info": "Off: always the likeliest token; temperature, top-p, top-k and seed then do nothing.",
        "temperature": "Temperature",
        "temperature_info": "Above 1 bolder, below 1 tamer.",
        "top_p": "Top-p",
        "top_p_info": "Draw from the likeliest tokens whose probabilities add up to this.",
        "top_k": "Top-k",
        "top_k_info": "Draw from so many of the likeliest tokens; 0 for all.",
        "seed": "Seed",
        "seed_info": "The same seed gives the same answer. Empty: a new one each time.",
        "repetition_penalty": "Repetition penalty",
        "repetition_penalty_info": "Above 1: repeat less. Works without drawing, too.",
        "stop_texts": "Stop texts",
        "stop_texts_info": "The answer ends before any of these. One a line.",
        "truncate_context": "Shorten a context that is too long",
        "truncate_context_info": "Its end is left out. Otherwise it is an error.",
        "limits": "What dolly cannot do",
        "limits_text": (
            "- It states wrong facts in a confident voice. Check whatever matters, dates and figures above all.\n"
            "- Calculating, programming, long chains of reasoning and tangled instructions are beyond it. Asked for a "
            "list of ten, it may give seven. Jokes and imitations of a style seldom work.\n"
            "- It is no dialogue model and has no memory of earlier questions. Prompt and answer together have room "
            "for {window} tokens.\n"
            "- It learned from English. It can be asked in Chinese, but answers far worse.\n"
            "- Its texts came from the open internet (The Pile), some of them offensive, and its 15,000 instructions "
            "were written by the staff of one company in the spring of 2023, partly after Wikipedia: the mistakes, "
            "the interests and the prejudices of these sources can come back in answers.\n"
            "- Newer models of its size do better on most tasks. Do not use it where a wrong answer does harm."
        ),
        "running": "{tokens} tokens · {speed:.1f} tokens/s",
        "waiting": "Reading the prompt …",
        "ended_stop": "Done",
        "ended_length": "Cut at the longest length",
        "ended_cancelled": "Stopped",
        "facts": "{tokens} tokens in {seconds:.1f} s, {speed:.1f} tokens/s · prompt {prompt} tokens",
        "facts_seed": " · seed {seed}",
        "empty": "Please write an instruction first.",
        "too_long": (
            "That is too long: the prompt has {tokens} tokens, and only {window} fit, the answer included. Please "
            "shorten it, or let the context be shortened under Settings."
        ),
        "failed": "This did not work: {message}",
    },
    "zh": {
        "intro": "一个按指令作答的模型。每个问题单独回答，不会记住上一个问题。",
        "language": "语言",
        "instruction": "指令",
        "instruction_hint": "一个问题或一项任务。按 Shift+Enter 提交。",
        "context": "上下文",
        "context_hint": "可选：指令所针对的一段文字。",
        "ask": "提问",
        "stop": "停止",
        "clear": "清空",
        "answer": "回答",
        "examples": "示例：dolly 训练过的各类任务各一条（训练数据是英文，示例也用英文）",
        "settings": "设置",
        "max_new_tokens": "回答的最大长度（token 数）",
        "max_new_tokens_info": "一个 token 约为四分之三个英文单词；一个汉字通常要占好几个 token。",
        "do_sample": "随机采样",
        "do_sample_info": "关闭后总是取概率最大的 token，温度、top-p、top-k 和随机种子不再起作用。",
        "temperature": "温度",
        "temperature_info": "大于 1 更发散，小于 1 更保守。",
        "top_p": "Top-p",
        "top_p_info": "只从累计概率达到此值的最可能的 token 中采样。",
        "top_k": "Top-k",
        "top_k_info": "只从最可能的若干个 token 中采样；0 表示不限。",
        "seed": "随机种子",
        "seed_info": "种子相同，回答相同。留空则每次换一个。",
        "repetition_penalty": "重复惩罚",
        "repetition_penalty_info": "大于 1 时减少重复，不采样时同样有效。",
        "stop_texts": "停止文本",
        "stop_texts_info": "回答在遇到其中任何一条之前结束。每行一条。",
        "truncate_context": "上下文过长时自动截短",
        "truncate_context_info": "舍去末尾部分；不勾选则报错。",
        "limits": "dolly 的局限",
        "limits_text": (
            "- 会用很肯定的语气说错话。凡是要紧的内容都请核实，尤其是日期和数字。\n"
            "- 不擅长计算、编程、多步推理和结构复杂的指令；要它列十条，可能只给七条；讲笑话、模仿文风也常常失败。\n"
            "- 不是对话模型，不记得之前的问题。提示与回答合计最多 {window} 个 token。\n"
            "- 训练语料以英文为主。可以用中文提问，但效果差很多。\n"
            "- 预训练文本取自公开网络（The Pile），其中有冒犯性的内容；一万五千条指令由一家公司的员工"
            "在 2023 年春季撰写，部分依据维基百科。这些来源里的错误、偏好和偏见，都可能出现在回答中。\n"
            "- 同等规模的新模型在多数任务上更好。答错会造成损害的场合，请不要使用。"
        ),
        "running": "{tokens} 个 token · 每秒 {speed:.1f} 个",
        "waiting": "正在读取提示……",
        "ended_stop": "已完成",
        "ended_length": "达到最大长度，已截断",
        "ended_cancelled": "已停止",
        "facts": "{tokens} 个 token，用时 {seconds:.1f} 秒，每秒 {speed:.1f} 个 · 提示 {prompt} 个 token",
        "facts_seed": " · 种子 {seed}",
        "empty": "请先填写指令。",
        "too_long": (
            "内容太长：提示共 {tokens} 个 token，而连同回答最多只能有 {window} 个。"
            "请缩短内容，或在“设置”中允许截短上下文。"
        ),
        "failed": "出错了：{message}",
    },
}

#: Kind of task in both languages, instruction, context; one of each kind in databricks-dolly-15k. They are among the
#: records of the nano recipe, so that the toy of `make demo` answers them.
EXAMPLES = (
    ("Open question", "开放问答", "Why does the sky look blue during the day?", ""),
    (
        "Question about a text", "阅读问答", "Why was the football match postponed?",
        "Heavy rain fell on the stadium all Friday night and left deep puddles near both goals. The referee inspected "
        "the pitch at nine on Saturday morning and judged it unsafe for the players. The match was moved to the "
        "following Wednesday, and all tickets remain valid.",
    ),
    (
        "Extraction", "信息抽取", "List all the ingredients mentioned in this recipe.",
        "For a simple vinaigrette, put a tablespoon of red wine vinegar into a jar with a teaspoon of mustard and a "
        "pinch of salt. Add three tablespoons of olive oil, close the lid and shake well. Grind some black pepper over "
        "the salad just before serving.",
    ),
    (
        "Summary", "摘要", "Explain briefly what the text tells us about compound interest.",
        "With compound interest, money earns interest on the starting sum and also on the interest already added. A "
        "deposit of 100 euros at five percent grows to 105 euros after one year and to 110.25 euros after two. Over "
        "decades the effect becomes very large.",
    ),
    (
        "Classification", "分类",
        'Is the sentence "The soup was cold and the waiter was rude" positive, negative or neutral?', "",
    ),
    ("Brainstorming", "头脑风暴", "What are some fun indoor activities for a rainy day?", ""),
    ("Creative writing", "创意写作", "Write a short poem about the sea.", ""),
)  # fmt: skip


def preferred_language(accept_language: str | None) -> str:
    """Of the header that browsers send, which names languages in order of preference: ours that stands first."""
    for tag in (accept_language or "").lower().split(","):
        if (language := tag.strip()[:2]) in LANGUAGES:
            return language
    return "en"
