"""What the view into the model says, in English and Chinese."""

LOOK_TEXTS = {
    "title": ("Look inside", "看看模型内部"),
    "question": ("Question", "问题"),
    "answer": ("Answer: choose a word", "回答：点一个词"),
    "answer_cut": (
        "The first {looked} of the answer's {all} tokens can be looked at.",
        "回答共 {all} 个词元，可以查看前 {looked} 个。",
    ),
    "bytes": (
        "This character is not in the vocabulary: the model wrote it as {count} byte tokens. Shown is number",
        "这个字不在词表里，模型用 {count} 个字节词元写出它。现在看的是第",
    ),
    "where": ("Where it looked", "看向哪里"),
    "where_hint": (
        "Bright patches were read most while “{word}” was chosen. Point at one to see its number.",
        "选出“{word}”时，越亮的图块被读取得越多。指向图块可看数值。",
    ),
    "no_picture": (
        "This conversation has no picture: there is nothing to look at, only words to choose from.",
        "这段对话没有图片，只能看它怎样选词。",
    ),
    "share": ("of its attention went to the picture", "的注意力落在图片上"),
    "share_hint": (
        "The picture is {patches} of the {seen} tokens it could see ({even} %).",
        "它能看到的 {seen} 个词元里，图片占 {patches} 个（{even}%）。",
    ),
    "layer": ("Layer", "层"),
    "head": ("Head", "注意力头"),
    "all": ("all, averaged", "全部平均"),
    "of": ("{number} of {count}", "第 {number} 个，共 {count} 个"),
    "compare": ("Only what this word looked at more than the others", "只显示比其他词看得更多的地方"),
    "compare_hint": (
        "Takes away the answer's average: many models have spots that every word looks at.",
        "减去整句回答的平均值：不少模型有些位置是每个词都会看的。",
    ),
    "smooth": ("Smooth", "平滑显示"),
    "opacity": ("Colours", "热图浓度"),
    "at_patch": ("Row {row}, column {column}: {value} %", "第 {row} 行第 {column} 列：{value}%"),
    "legend": ("share of the word's attention, per patch", "每个图块所占的注意力"),
    "table": ("Layers and heads", "各层与各注意力头"),
    "table_hint": (
        "The brighter, the more of the word's attention went to the picture. Choose a cell to see where.",
        "越亮，表示这个词越关注图片。点一格，看它看向哪里。",
    ),
    "table_cell": ("layer {layer}, head {head}: {value} %", "第 {layer} 层，第 {head} 头：{value}%"),
    "reset": ("Average all again", "恢复全部平均"),
    "nearly": ("The words it nearly said", "它差点说出的词"),
    "nearly_hint": (
        "The likeliest next tokens at this place, before temperature or top-p.",
        "此处概率最高的词元，未经温度或 top-p 调整。",
    ),
    "chosen": ("chosen", "选中"),
    "rank": (
        "Chosen was “{word}” with {value} %, number {rank} by likelihood.",
        "选中的是“{word}”，概率 {value}%，排第 {rank}。",
    ),
    "tokens": ("What the model read", "模型读到的序列"),
    "tokens_hint": (
        "{count} tokens; ▁ is a space. The picture takes the place of words. Choose a token to learn about it.",
        "共 {count} 个词元；▁ 表示空格。图片和词一样占位置。点一个词元看说明。",
    ),
    "token": ("“{name}”: place {place}, id {ids}", "“{name}”：位置 {place}，编号 {ids}"),
    "token_control": (
        "a control token, which no typed text becomes",
        "控制词元，任何输入的文字都不会变成它",
    ),
    "token_answer": ("part of the answer", "属于回答"),
    "token_image": (
        "The picture: {count} patches of {grid} x {grid}, one vector each, at the places {first} to {last}. The "
        "language model reads each like a word.",
        "图片：{grid} x {grid} 共 {count} 个图块，每块一个向量，占位置 {first} 至 {last}。语言模型像读词一样读它们。",
    ),
    "patches": ("What the vision tower sees", "视觉编码器看到的"),
    "patches_hint": (
        "Choose a patch: bright are those that look alike to the vision tower, before any word was read.",
        "点一个图块：越亮的图块，在视觉编码器看来与它越像（这时还没有读任何词）。",
    ),
    "patch": (
        "Patch {number}: row {row}, column {column}, place {place} in the sequence",
        "第 {number} 个图块：第 {row} 行第 {column} 列，在序列中的位置 {place}",
    ),
    "patch_like": (
        "Most alike: {others}. Over all patches the cosine lies between {low} and {high}.",
        "最像的是：{others}。与全部图块的余弦相似度在 {low} 与 {high} 之间。",
    ),
    "patch_name": ("row {row}, column {column} ({value})", "第 {row} 行第 {column} 列（{value}）"),
    "similar_legend": ("cosine similarity to the chosen patch", "与所选图块的余弦相似度"),
    "note": (
        "Attention shows which places were read while a word was chosen. It does not show why the word was chosen: "
        "what is read may go unused, and behind the first layers every place also holds what it gathered from others.",
        "注意力说明选词时读取了哪些位置，并不说明为什么选了这个词：读到的内容未必用上，而且过了最初几层，"
        "每个位置都已混入从别处汇集来的信息。",
    ),
    "loading": ("Unpacking …", "正在展开 …"),
    "too_old": (
        "This browser cannot unpack the data. Chrome 80, Firefox 113 and Safari 16.4 or later can.",
        "这个浏览器无法展开数据，请使用 Chrome 80、Firefox 113、Safari 16.4 或更新版本。",
    ),
    "picture": ("picture", "图片"),
    "view": ("{word}  {probability}\nlooks at the picture: {share}", "{word}  {probability}\n看图片：{share}"),
    "arrows": ("Arrow keys move.", "可用方向键移动。"),
}  # fmt: skip
