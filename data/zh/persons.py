"""Private people in texts: names that a writer cannot know, and data that is nobody's business.

Rules see plain wordings alone ("这位女士名叫……", "王先生"): neither a name that stands by itself, nor a name badge
that is read out, nor a face that was recognised. A public person whom the page does not name is taken for private.
"""

import itertools
import re

SURNAMES = (
    "王李张刘陈杨黄赵吴周徐孙马朱胡郭何林罗郑梁谢宋唐许韩冯邓曹彭曾肖田董袁潘蒋蔡余杜叶程苏魏吕丁任沈姚卢姜崔钟谭"
    "陆汪范石廖贾夏韦傅邹孟熊秦邱江尹薛闫段雷侯龙史陶黎贺顾毛郝龚邵万钱严覃武戴莫孔汤"
)
MINORS = re.compile(r"未成年|小学生|中学生|男孩|女孩|小孩|孩子|儿童|幼儿|婴儿|宝宝|男童|女童|少年|少女")
NAMED = re.compile(  # not what people call a thing, nor a thing beside a person
    rf"(?:(?<!地)人|[男女他她位生师者孩童婴年]|同学|老人)[^，。；！？\n们座条艘种款幅部所家间只]{{0,6}}?"
    rf"(?:名叫|名字叫做?|名字是|姓名[是为]|全名[是叫]|名为|叫(?=[{SURNAMES}][\u4e00-\u9fff]))"
    r"[“「\"‘《]?(?P<name>(?!什么|啥|谁|哪)[\u4e00-\u9fff·]{2,}|[A-Z][\w·]+)"
)
ADDRESSED = re.compile(rf"(?:^|[是叫为位和与，。：“])(?P<name>[{SURNAMES}](?:先生|女士|小姐|同学|老师|太太))")
PRIVATE_DATA = re.compile(
    r"(?<!\d)1[3-9]\d{9}(?!\d)|(?<!\d)\d{17}[\dXx](?!\d)|[a-zA-Z0-9_.+-]{1,64}@[a-zA-Z0-9-]{1,64}\.[a-zA-Z]{2,}"
    r"|[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼][A-Z][ ·•.]?"
    r"(?=[A-Z]*\d)[A-Z0-9]{5,6}(?![A-Z0-9])"
)


def find_unknown_name(text: str, title: str, source: str) -> str | None:
    """Return how a person is called by a name that neither title nor source has, or a minor by one not in the title."""
    for found in itertools.chain(NAMED.finditer(text), ADDRESSED.finditer(text)):
        known = title if MINORS.search(found[0]) else f"{title}\n{source}"
        if found["name"][:2] not in known:
            return found[0]
    return None
