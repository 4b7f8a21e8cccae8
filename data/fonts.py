"""A font for pictures with Chinese in them, among those that the system has."""

from pathlib import Path

# Families that have Chinese characters, those drawn for the mainland first, and what their files are called.
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "SimHei", "SimSun",
    "Noto Sans CJK JP", "Noto Serif CJK SC", "AR PL UMing CN", "Droid Sans Fallback", "Arial Unicode MS",
)  # fmt: skip
FONT_FILES = ("cjk", "notosanssc", "sourcehan", "wqy", "msyh", "pingfang", "heiti", "simhei", "simsun", "uming")


def find_chinese_font() -> str | None:
    """Return the name of a font that has Chinese characters, None where the system has none that is known."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    for is_rescanned in (False, True):
        if is_rescanned:  # what was installed after Matplotlib made its list of fonts
            for file in font_manager.findSystemFonts():
                if any(part in Path(file).name.lower().replace("-", "") for part in FONT_FILES):
                    manager.addfont(file)
        known = set(manager.get_font_names())
        for name in CHINESE_FONTS:
            if name in known:
                return name
    return None
