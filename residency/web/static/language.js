// Sets the browser's language to zh-CN or zh-TW for Gradio's page, if Chinese comes before English: the page supports
// these two names only, and reads only the first language of the browser (it falls back to English for zh-HK or
// zh-Hans-CN). Messages use the first of Chinese and English among all languages (`language.preferred`).
{
  const read = navigator.languages.find(each => /^(zh|en)\b/i.test(each));
  const known = /hant|tw|hk|mo/i.test(read) ? "zh-TW" : "zh-CN";
  if (/^zh/i.test(read)) Object.defineProperty(navigator, "language", {get: () => known});
}
