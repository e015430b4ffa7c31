"""The small words by which a language is told: articles, pronouns, prepositions, conjunctions, auxiliaries.

A third to a half of the words of any prose are among its language's hundred commonest, and hardly any is among
another's, so a dozen words tell the language where a model of letters needs a paragraph. What means something in
mathematics (sin, per, plus) or is one letter is left out; words that two languages share count for both.
"""

_LISTS = {
    "en": """
        the of and to in is that it was for on are as with his they be at one have this from or had by hot but
        some what there we can out other were all your when up use how said an each she which do their if will
        way many then them would like so these her him has more two no could than been who its now did get come
        made may part i'm let's it's that's i'll wait okay let me my you he us our since because here where
        maybe also just first should must check need know think right yes not about into after before again any
        over only same see thus hence therefore means number sum find total equal equals answer problem step
        steps given per plus sin cos tan war die hat man den men van met ten son pour far fact none once don am
        das mine sale care
    """,
    "de": """
        der die das und ist nicht ein eine einen einem einer eines zu den dem des mit sich auf für von im als
        auch es an werden wird aus er sie wir ich ihr nach bei um noch wie über nur oder aber vor zur bis mehr
        durch man sind war dann soll wenn haben hat kann muss müssen können jetzt also weil dass daß wurde sein
        seine diese dieser dieses hier ergibt gleich zwei drei erhalten zuerst damit schon alle unter zwischen
        warte lass uns mich
    """,
    "fr": """
        le la les un une des du de et est que qui dans pour pas sur au aux avec par ce cette ces il elle nous
        vous ils je on se sa ses son ne plus mais ou où donc car si tout tous être avoir fait sont ont était
        peut alors aussi comme deux leur leurs même bien très sans sous après avant entre faut doit cela ça ici
        puis chaque nombre c'est d'abord qu'il n'est l'on attendez attends voyons ainsi
    """,
    "es": """
        el la los las un una unos unas de del que y en es por para con no se su sus lo como más pero al le ya
        este esta estos estas entre cuando muy sin sobre también hasta hay donde quien desde todo todos nos
        durante uno ni contra ese eso esa porque son fue ser tiene tienen puede podemos vamos entonces ahora dos
        tres si cada así luego mismo número espera primero esto
    """,
    "it": """
        il lo la gli le un uno una di del della dei delle degli e è che in non si per con su da dal dalla al
        alla come ma anche più sono ha ho hanno questo questa questi queste quello cui se nel nella quindi ora
        poi essere può possiamo dobbiamo abbiamo due tre ogni tutti tutto perché così allora dove quando numero
        aspetta prima molto suo sua loro
    """,
    "pt": """
        o os as um uma uns umas de do da dos das e é que em no na nos nas para com não se por mais como mas ao
        foi ele ela tem seu sua ou quando muito já eu também só pelo pela até isso entre era depois sem mesmo
        aos ter seus quem esse essa este esta você são está então agora temos vamos podemos cada dois duas três
        assim porque número espere primeiro
    """,
    "nl": """
        de het een en van is dat die in te op voor met niet zijn aan er om ook als dan maar bij nog uit door
        over ze hij wij we ik je wat naar heeft hebben kan moet moeten kunnen worden wordt deze dit daar hier
        dus omdat want meer veel geen nu elke twee drie eerst laten wacht tussen onder zou zal was waren
    """,
    "pl": """
        i w na z do nie się jest że to jak ale o po co od za są przez dla tak czy już być tylko jego jej ich
        może można więc ten ta te tego tej tym który która które gdzie kiedy jeśli ponieważ mamy musimy teraz
        każdy dwa trzy również oraz bardzo liczba najpierw czekaj
    """,
    "sv": """
        och att det som en på är av för med till den har de inte om ett men var jag sig från vi så kan när man
        hade nu över ut skulle eller vad sin här alla också efter upp vara måste då två tre varje eftersom
        mellan under detta denna dessa första vänta talet
    """,
    "tr": """
        ve bir bu da de için ile çok ne gibi daha var olarak olan kadar sonra ama o ben biz siz her ya en şimdi
        eğer çünkü değil ise iki üç sayı önce olur olduğunu yani bunu şu hem tüm nasıl bekle
    """,
    "id": """
        yang dan di itu dengan untuk tidak ini dari dalam akan pada juga ke karena ada mereka kita saya kami
        bisa oleh adalah atau jika maka dua tiga setiap jadi sudah harus lebih kemudian sekarang jumlah tunggu
        pertama seperti
    """,
    "vi": """
        và của là có cho không với các được một trong này đó để những khi thì ta chúng tôi ra nên như từ vào
        bằng hai ba số nếu vì cũng đã sẽ phải trên mỗi bây giờ ở về lại
    """,
    "ro": """
        și în de la cu nu este sunt un o pe care din pentru ce mai că să se ca dar sau au fost acest această
        aceste ale al lui ei noi putem trebuie avem două trei fiecare dacă deci acum când numărul așteaptă prin
        între
    """,
    "cs": """
        a je se na v že to s z do o ale jako za by pro jsou nebo tak už po jen od co při který která které než
        může když pokud protože máme musíme teď každý dva tři také počet nejprve počkej jeho jejich podle mezi
    """,
    "fi": """
        ja on ei se että oli hän mutta ovat kun niin myös jos tai ole kuin voi nyt sitten koska tämä nämä joka
        jotka kaksi kolme mitä siis meidän pitää luku jokainen ensin odota vain
    """,
}

LANGUAGES = tuple(_LISTS)


def function_words() -> dict[str, int]:
    """Each word with the languages it belongs to: bit i stands for LANGUAGES[i]."""
    found: dict[str, int] = {}
    for bit, language in enumerate(LANGUAGES):
        for phrase in _LISTS[language].split():
            for word in phrase.split("'"):
                if len(word) > 1:
                    found[word] = found.get(word, 0) | 1 << bit
    return found
